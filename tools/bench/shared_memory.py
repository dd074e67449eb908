"""Memory of a self-shared teacher against a separate one, on one rank:

    python tools/bench/shared_memory.py assets/smollm2-135m-instruct

Three stages, a process each: the frozen backbone with the student's adapters alone, with the teacher's too, and with a
frozen copy of the model in an engine of its own beside it. Weights are counted. Growth is that of the process's
anonymous memory up to the end of an optimizer step, and in the last stage of the copy's forward pass too.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
STAGES = ("student alone", "self-shared", "separate")


def main(argv: list[str] | None = None) -> int:
    """Measure every stage in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder of the backbone")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--pattern", default=r"\.(q|v|up)_proj$", help="linear layers with adapters")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.stage:
        print(json.dumps(measure(Path(options.model), stage=options.stage, rank=options.rank, pattern=options.pattern)))
        return 0
    print(f"{'stage':<16}{'teacher weights MB':>20}{'share of backbone':>20}{'process grew MB':>18}")
    for stage in STAGES:
        command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--stage", stage]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        held, grew = found["teacher_bytes"] / 1e6, found["grew"] / 1e6
        print(f"{stage:<16}{held:>20.1f}{found['teacher_frac']:>20.4f}{grew:>18.1f}")
    return 0


def measure(folder: Path, *, stage: str, rank: int, pattern: str) -> dict[str, float]:
    """Bytes that the teacher holds, over those of the backbone, and the process's growth from before the models."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from largekd.config.adapters import AdaptersConfig
    from largekd.config.train import OptimConfig, TrainConfig
    from largekd.engine.ds_config import frozen_ds_config, train_ds_config
    from largekd.engine.frozen import FrozenEngine
    from largekd.models.adapters import adapt, adapted_linears, adapter_sizes
    from largekd.models.decoder import Decoder
    from largekd.monitoring.memory import process_memory
    from largekd.sharding.cluster import process_group

    train = TrainConfig(global_batch_size=1, micro_batch_size=1, sequence_length=64, precision="bf16", max_steps=1)
    placement = json.loads((CHECKOUT / "ds_configs" / "zero3.json").read_text())
    with process_group(timeout_s=120):
        trained = train_ds_config(placement, train=train, optim=OptimConfig(), accumulation=1, world_size=1)
        frozen = frozen_ds_config(placement, train=train, world_size=1)
        before = process_memory().anonymous_bytes or 0
        model = _load(folder, ds_config=trained)
        adapt(model, config=AdaptersConfig(rank=rank, pattern=pattern), ds_config=trained, seed=0)
        sizes = adapter_sizes(model)
        teacher_elements = sizes.teacher
        if stage != "self-shared":
            teacher_elements = 0
            for _, linear in adapted_linears(model):
                linear.teacher = None
        student = Decoder(model=model)
        use = "both" if stage == "self-shared" else "student"
        engines: list[Any] = [_trained_once(student, ds_config=trained, use=use)]
        if stage == "separate":
            teacher = FrozenEngine(module=Decoder(model=_load(folder, ds_config=frozen)), ds_config=frozen)
            teacher(batch=_batch(rows=1))
            engines.append(teacher)
            teacher_elements = sizes.backbone
        grew = (process_memory().anonymous_bytes or 0) - before
        for held in engines:
            held.close()
    return {
        "teacher_bytes": teacher_elements * 2.0,
        "teacher_frac": teacher_elements / sizes.backbone,
        "grew": float(grew),
    }


def _load(folder: Path, *, ds_config: dict[str, Any]) -> Any:
    from largekd.models.build import build_model, load_pretrained
    from largekd.models.source import read_config

    config = read_config(folder, key="model", trust_remote_code=False)
    model = build_model(config, ds_config=ds_config, precision="bf16", attention="sdpa")
    load_pretrained(model, folder=folder, rank=0)
    return model


def _batch(*, rows: int) -> Any:
    import torch

    from largekd.contracts import Batch

    ids = torch.arange(64).remainder(50).add(3).repeat(rows, 1)
    return Batch(
        input_ids_BS=ids,
        labels_BS=ids,
        token_weight_BS=torch.ones_like(ids, dtype=torch.float32),
        counted_T=torch.arange(ids.numel()),
        attention_mask_BS=torch.ones_like(ids),
    )


def _trained_once(student: Any, *, ds_config: dict[str, Any], use: str) -> Any:
    import torch
    from torch import nn

    from largekd.config.train import OptimConfig
    from largekd.engine.train import TrainEngine
    from largekd.optim.groups import build_groups

    class Once(nn.Module):
        """A loss of the last hidden states: what is measured is what the models hold."""

        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self) -> dict[str, torch.Tensor]:
            """The mean square."""
            last = self.student(batch=_batch(rows=2 if use == "both" else 1), adapters=use)["last"]
            return {"loss": last.float().square().mean()}

    module = Once()
    groups = build_groups(module.named_parameters(), config=OptimConfig())
    engine = TrainEngine(module=module, groups=groups, ds_config=ds_config)
    engine.backward(engine()["loss"], last=True)
    engine.step(lr=1e-4)
    return engine


if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    raise SystemExit(main())
