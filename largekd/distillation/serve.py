"""Serving a run's teacher over HTTP, on nodes of its own."""

import hashlib
import logging
import queue
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from largekd.config.addresses import is_loopback_host
from largekd.config.placement import read_placements
from largekd.config.run import RunConfig
from largekd.config.teacher import OnlineTeacherConfig
from largekd.data.vocabulary import load_tokenizer, tokenizer_fingerprint
from largekd.distillation.models import build_teacher
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder, HeadSpec
from largekd.models.digest import sampled_weights_digest
from largekd.models.source import ModelFolder, find_model
from largekd.runtime.http import read_token
from largekd.runtime.logging import configure_logging, write_line
from largekd.runtime.ranks import MainFirst, Ranks, Together, current_ranks, new_control_group, require_same
from largekd.runtime.shutdown import StopSignal
from largekd.sharding.accelerator import device
from largekd.sharding.cluster import process_group
from largekd.teachers.remote_own import HeadInfo, ServerInfo
from largekd.teachers.remote_wire import DTYPE_NAMES, PROTOCOL, Limits
from largekd.teachers.served import ServedTeacher, Work
from largekd.teachers.server import HttpServer, Served, application

logger = logging.getLogger(__name__)

DEFAULT_POSITIONS = 1 << 18
_DAY_S = 86_400
_HEAD_FILE = "head.safetensors"


def check_address(host: str, *, token_variable: str | None) -> str | None:
    """The token. Errors: ConfigError for a variable without a token, and for a public address without one."""
    token = None if token_variable is None else read_token(token_variable, key="--token-variable")
    if token is None and not is_loopback_host(host):
        raise ConfigError(
            f"--host {host}: whoever reaches it could use the teacher; name the environment variable with a token by "
            "--token-variable, or listen on 127.0.0.1."
        )
    return token


def serve_over_http(
    config: RunConfig, *, host: str, port: int, token_variable: str | None, positions: int = DEFAULT_POSITIONS
) -> None:
    """Serve the online teacher of `config` until told to stop. A collective call on every rank of the job.

    positions: the most that one request may hold. Errors: LargeKDError.
    """
    token = check_address(host, token_variable=token_variable)
    teacher = config.teacher
    if not isinstance(teacher, OnlineTeacherConfig):
        raise ConfigError(f"teacher.kind = {teacher.kind!r}: only an online teacher has weights that can be served.")
    with process_group(timeout_s=config.train.collective_timeout_s), ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        ranks = current_ranks()
        configure_logging(level=config.log.level, rank=ranks.rank)
        require_same(f"{teacher} {config.train}", what="configuration", key="--config and its overrides")
        group = new_control_group(timeout_s=_DAY_S)
        source, model = _find(teacher, precision=config.train.precision, ranks=ranks, group=group)
        limits = Limits(positions=positions, sequence_length=config.train.sequence_length)
        served, decoder = _build(
            config, teacher=teacher, source=source, ranks=ranks, limits=limits, model=model, group=group
        )
        stack.callback(served.close)
        configure_logging(level=config.log.level, rank=ranks.rank)
        head = served.head()
        works: queue.Queue[Work] = queue.Queue()
        with Together(group=group):
            if ranks.is_main:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="largekd-serve-")))
                save_file(head, folder / _HEAD_FILE)
                tokenizer = load_tokenizer(str(source.path), trust_remote_code=source.trust_remote_code)
                info = _describe(
                    head["weight"],
                    file=folder / _HEAD_FILE,
                    spec=decoder.head_spec,
                    tokenizer=tokenizer_fingerprint(tokenizer),
                    limits=limits,
                    model=model,
                )
                app = application(Served(info, folder / _HEAD_FILE, limits, works, token))
                server = stack.enter_context(HttpServer(app, host=host, port=port))
                write_line(f"serving {teacher.model} on http://{host}:{server.port}")
        served.serve(works, stopping=lambda: stop.requested)
        # The launcher, which signals one rank after another, may yet signal this one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _find(
    teacher: OnlineTeacherConfig, *, precision: str, ranks: Ranks, group: dist.ProcessGroup | None
) -> tuple[ModelFolder, str]:
    """Where the teacher is, and what tells it from other teachers."""
    source = find_model(
        teacher.model,
        key="teacher.model",
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
        first=lambda: MainFirst(ranks=ranks, group=group),
    )
    with Together(group=group):
        weights = sampled_weights_digest(source.path)
    require_same(weights, what="teacher", key="teacher.model")
    # The same weights in another precision give other answers.
    return source, hashlib.sha256(f"{weights} {precision}".encode()).hexdigest()


def _build(
    config: RunConfig,
    *,
    teacher: OnlineTeacherConfig,
    source: ModelFolder,
    ranks: Ranks,
    limits: Limits,
    model: str,
    group: dist.ProcessGroup | None,
) -> tuple[ServedTeacher, Decoder]:
    placement = read_placements(config).teacher
    assert placement is not None
    ds_config = frozen_ds_config(placement, train=config.train, world_size=ranks.world_size)
    precision = config.train.precision
    decoder = build_teacher(
        teacher, folder=source, precision=precision, ds_config=ds_config, ranks=ranks, key="teacher"
    )
    engine = FrozenEngine(module=decoder, ds_config=ds_config)
    served = ServedTeacher(
        engine=engine, decoder=decoder, limits=limits, model=model, ranks=ranks, device=device(), group=group
    )
    return served, decoder


def _describe(
    weight_VD: Tensor, *, file: Path, spec: HeadSpec, tokenizer: str, limits: Limits, model: str
) -> dict[str, Any]:
    """What GET /v1/info tells."""
    with open(file, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    head = HeadInfo(
        vocab_size=spec.vocab_size, scale=spec.scale, softcap=spec.softcap, bytes=file.stat().st_size, sha256=sha256
    )
    return ServerInfo(
        protocol=PROTOCOL,
        model=model,
        tokenizer=tokenizer,
        vocab_size=spec.vocab_size,
        width=weight_VD.shape[1],
        dtype=DTYPE_NAMES[weight_VD.dtype],
        positions=limits.positions,
        sequence_length=limits.sequence_length,
        head=head,
    ).model_dump()
