"""One rank of one contender, from the start of its process to the end of its first optimizer step.

Started by startup.py. Nothing but the standard library is imported before the contender's own code asks for it.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STARTED = "LARGEKD_BENCH_STARTED"
FIRST_STEP = "FIRST_STEP "
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": False},
}


def finish() -> NoReturn:
    """Print what this process has spent so far, wait for the other ranks, and leave without tidying up."""
    wall_s = time.time() - float(os.environ[STARTED])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = time.process_time() + children.ru_utime + children.ru_stime
    sys.stdout.write(f"\n{FIRST_STEP}{json.dumps({'cpu_s': cpu_s, 'wall_s': wall_s})}\n")
    sys.stdout.flush()
    import torch.distributed as dist

    dist.barrier()
    os._exit(0)


def ours(*, recipe: str) -> None:
    """`launch/train.py --config RECIPE`, stopped after the first step."""
    sys.path.insert(0, str(LAUNCH))
    import train

    import largekd.distillation.loop as loop

    train_step = loop.train_step

    def first_step(*arguments: Any, **options: Any) -> Any:
        train_step(*arguments, **options)
        finish()

    loop.train_step = first_step
    train.main(["--config", recipe])


def trl(*, recipe: str, zero3: bool) -> None:
    """TRL's GKDTrainer on the same models, rows and batch, stopped after the first step."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class FirstStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            finish()

    tree = json.loads(Path(recipe).read_text())
    train, ranks = tree["train"], int(os.environ["WORLD_SIZE"])
    settings = GKDConfig(
        output_dir=f"{tree['run']['dir']}-trl",
        lmbda=0.0,
        beta=0.0,
        per_device_train_batch_size=train["micro_batch_size"],
        gradient_accumulation_steps=train["global_batch_size"] // train["micro_batch_size"] // ranks,
        max_steps=train["max_steps"],
        max_length=train["sequence_length"],
        learning_rate=tree["optim"]["lr"],
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=ZERO3 if zero3 else None,
    )
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(tree["student"]["model"]),
        teacher_model=AutoModelForCausalLM.from_pretrained(tree["teacher"]["model"]),
        args=settings,
        train_dataset=load_dataset("json", data_files=tree["data"]["train"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(tree["teacher"]["model"]),
        callbacks=[FirstStep()],
    )
    trainer.train()


if __name__ == "__main__":
    contender, recipe_file = sys.argv[1:]
    if contender == "ours":
        ours(recipe=recipe_file)
    else:
        trl(recipe=recipe_file, zero3=contender == "trl_zero3")
