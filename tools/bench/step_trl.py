"""One contender's process: TRL's GKDTrainer, off-policy (lmbda 0), forward KL (beta 0), as its own train() runs it.

Started by step.py with TRL's interpreter. No DeepSpeed, no recomputation, nothing written to disk: all in TRL's favour.
"""

import os
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from step_cell import LR, Cell, Clock, Job, serve, token_ids
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from vocab_cell import DTYPES


def run(job: Job) -> dict[str, Any]:
    """Load both models, train, report."""
    clock = Clock(job)
    cell = job.cell
    autocast = job.contender == "trl_autocast"
    student = _load(f"{job.models}/student", dtype=torch.float32 if autocast else DTYPES[cell.dtype])
    teacher = _load(f"{job.models}/teacher", dtype=DTYPES[cell.dtype])
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            output_dir=folder,
            lmbda=0.0,
            beta=0.0,
            per_device_train_batch_size=cell.micro_batch,
            max_steps=job.steps,
            max_length=cell.positions,
            learning_rate=LR,
            lr_scheduler_type="constant",
            bf16=autocast,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=_dataset(cell, steps=job.steps),
            data_collator=_collate,
            processing_class=_tokenizer(),
            callbacks=[_Steps(clock)],
        )
        # The rows come in the order of the other contenders.
        trainer._get_train_sampler = lambda *_: None
        trainer.train()
    return clock.report()


class _Steps(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.before_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.after_step(state.global_step - 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._clock.add_loss(float(logs["loss"]))


def _load(folder: str, *, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", use_cache=False)


def _dataset(cell: Cell, *, steps: int) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [row for step in range(steps) for row in token_ids(cell, step=step).tolist()]}
    )


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The keys that the trainer's own collator gives, without prompts: everything is a completion."""
    ids_BS = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS.clone()}


def _tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in: the trainer wants one, but the rows are tokens already."""
    words = models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>")


if __name__ == "__main__":
    serve(run)
