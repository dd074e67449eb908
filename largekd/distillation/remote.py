"""Building a remote teacher: its servers are asked who they are before anything else is built."""

from dataclasses import dataclass, field
from pathlib import Path

from largekd.config.divergence import TopKSignalConfig
from largekd.config.run import RunConfig
from largekd.config.schedule import extremes
from largekd.config.teacher import RemoteTeacherConfig
from largekd.data.vocabulary import PROBE, tokenizer_fingerprint
from largekd.distillation.models import Sources
from largekd.errors import ConfigError, TeacherError
from largekd.runtime.http import read_token
from largekd.runtime.ranks import MainFirst, Ranks, Together
from largekd.sharding.accelerator import device
from largekd.teachers.remote import Patience, RemoteTeacher, Source
from largekd.teachers.remote_http import Replicas
from largekd.teachers.remote_own import Expected, OwnServers, fetch_head, read_head, read_info
from largekd.teachers.remote_prompts import (
    VLLM,
    Dialect,
    PromptServers,
    SGLang,
    check_temperature,
    probe_tokenizer,
)


@dataclass(frozen=True)
class Surroundings:
    """What a teacher that may wait takes from its run: the run folder, and see Patience."""

    folder: Path = field(default_factory=Path.cwd)
    patience: Patience = field(default_factory=lambda: Patience(wait_s=0.0))


def build_remote(
    teacher: RemoteTeacherConfig, *, config: RunConfig, sources: Sources, ranks: Ranks, around: Surroundings
) -> RemoteTeacher:
    """The teacher, when its servers are there and are the ones that are meant. A collective call.

    Errors: ConfigError, TeacherError; on all ranks.
    """
    group = around.patience.group
    with Together(group=group):
        if sources.student_of_teacher is not None:
            raise ConfigError("objective.translation: a remote teacher must have the student's tokenizer.")
        replicas = Replicas(
            servers=teacher.servers,
            token=None
            if teacher.token_variable is None
            else read_token(teacher.token_variable, key="teacher.token_variable"),
            timeout_s=teacher.timeout_s,
            retries=teacher.retries,
            # Ranks begin with different replicas.
            first=ranks.rank,
        )
    if teacher.protocol == "largekd":
        source = _own_servers(replicas, sources=sources, config=config, ranks=ranks, around=around)
    else:
        with Together(group=group):
            source = _prompt_servers(replicas, teacher=teacher, sources=sources, config=config, ranks=ranks)
    patience = Patience(
        wait_s=teacher.wait_s, beat=around.patience.beat, stopping=around.patience.stopping, group=group
    )
    return RemoteTeacher(source, patience=patience)


def _own_servers(
    replicas: Replicas, *, sources: Sources, config: RunConfig, ranks: Ranks, around: Surroundings
) -> Source:
    expected = Expected(
        tokenizer=tokenizer_fingerprint(sources.teacher_tokenizer),
        vocab_size=sources.teacher.config.vocab_size,
        shared_ids=sources.shared_vocab_size,
        sequence_length=config.train.sequence_length,
        rows=max(config.train.micro_batch_size, config.eval.micro_batch_size or 1),
    )
    group = around.patience.group
    with Together(group=group):
        info = read_info(replicas, expected=expected)
    with MainFirst(ranks=ranks, group=group):
        path = fetch_head(replicas, info=info, folder=around.folder)
    with Together(group=group):
        head = read_head(path, info=info, device=device())
    return OwnServers(replicas=replicas, info=info, head=head, shared_ids=sources.shared_vocab_size, rank=ranks.rank)


def _prompt_servers(
    replicas: Replicas, *, teacher: RemoteTeacherConfig, sources: Sources, config: RunConfig, ranks: Ranks
) -> Source:
    signal = config.objective.signal
    if not isinstance(signal, TopKSignalConfig):
        raise TeacherError(
            f"objective.signal.kind = {signal.kind!r}: teacher.protocol {teacher.protocol} gives the likeliest ids "
            "alone; set it to top_k, with objective.signal.k at most what the server allows."
        )
    # The request of the first step says nothing of a curve's later values.
    check_temperature(extremes(config.objective.temperature), tail=signal.tail)
    dialect: Dialect = SGLang()
    if teacher.protocol == "vllm":
        assert teacher.served_model is not None
        dialect = VLLM(model=teacher.served_model)
    if ranks.is_main:
        tokenizer = sources.teacher_tokenizer
        probe_tokenizer(
            replicas,
            path=dialect.tokenize_path,
            model=teacher.served_model,
            text=PROBE,
            expected=[list(tokenizer.encode(PROBE, add_special_tokens=special)) for special in (False, True)],
            # Older SGLang has no such endpoint.
            required=teacher.protocol == "vllm",
        )
    return PromptServers(
        replicas=replicas, dialect=dialect, k=signal.k, tail=signal.tail, shared_ids=sources.shared_vocab_size
    )
