"""What each kind of teacher needs to teach an 8B student from 70B: the planner's memory of one rank, as a table.

    python tools/plan_teachers.py

Models of Llama's shapes, 8 ranks, bf16, rows of 4,096, micro-batch 2, global batch 64, activation checkpointing.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from largekd.config.load import parse_config
from largekd.planner.plan import plan

RANKS = 8
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TEACHER = {
    **STUDENT,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
TOP_K = {"signal": {"kind": "top_k", "k": 64}}
ON_GPU, IN_HOST = "ds_configs/teacher_zero3.json", "ds_configs/teacher_cpu.json"


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
            place = Path(folder) / name
            place.mkdir()
            (place / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        sys.stdout.write("| teacher | student on the accelerator | its optimizer in host memory |\n|---|---|---|\n")
        for title, (teacher, objective) in kinds(f"{folder}/teacher", student=f"{folder}/student").items():
            cells = [
                _peaks(teacher, objective=objective, student=f"{folder}/student", deepspeed=placement)
                for placement in ("ds_configs/zero3.json", "ds_configs/zero3_optimizer_cpu.json")
            ]
            sys.stdout.write(f"| {title} | {' | '.join(cells)} |\n")


def kinds(teacher: str, *, student: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """(teacher block, objective block) by the name in the table."""
    online = {"kind": "online", "model": teacher, "deepspeed": ON_GPU}
    remote = {"kind": "remote", "model": teacher, "servers": ["http://127.0.0.1:8400"]}
    small = {"kind": "online", "model": student, "deepspeed": ON_GPU}
    members = [{"name": "large", "teacher": online}, {"name": "small", "teacher": small}]
    ema = {"kind": "ema", "deepspeed": ON_GPU}
    return {
        "online, on the accelerators": (online, {}),
        "online, in host memory": ({**online, "deepspeed": IN_HOST}, {}),
        "remote, top 64, vLLM": ({**remote, "protocol": "vllm", "served_model": "teacher"}, TOP_K),
        "remote, hidden states": (remote, {}),
        "mixture with a second one of 8B": ({"kind": "mixture", "members": members}, {}),
        "average of the student": (ema, {}),
        "the same, 3 supervised layers": (ema, {"deep_supervision": {"layers": [7, 15, 23]}}),
        "self-shared, an 8B with adapters of rank 8": ({"kind": "self_shared"}, {}),
    }


def _peaks(teacher: dict[str, Any], *, objective: dict[str, Any], student: str, deepspeed: str) -> str:
    config = parse_config(
        {
            "run": {"dir": "runs/plan"},
            "teacher": teacher,
            "student": {"model": student, "deepspeed": deepspeed},
            "data": {"train": "unread.jsonl"},
            "train": {
                "max_steps": 1,
                "global_batch_size": 64,
                "micro_batch_size": 2,
                "sequence_length": 4096,
                "precision": "bf16",
                "activation_checkpointing": True,
            },
            "objective": objective,
            "checkpoint": {"every_steps": 0},
        }
    )
    peaks = plan(config, world_size=RANKS).peaks
    return f"{peaks['accelerator'] / 1e9:.1f} / {peaks['host'] / 1e9:.1f}"


if __name__ == "__main__":
    main()
