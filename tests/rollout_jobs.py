"""What the ranks do in the tests of rollouts: write answers with a sharded model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from step_jobs import build_side
from tiny_run import distil

from largekd.distillation import loop
from largekd.generation.sampling import DrawRule
from largekd.generation.writer import Question, StopTokens, Writer
from largekd.models.replica import is_copyable, whole_bytes, whole_copy
from largekd.runtime.ranks import current_ranks
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathered, is_sharded, resident_bytes
from largekd.teachers.protocol import StoppedWaitingError


def distil_given_up(*, tree: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """A whole run whose teacher is waited for in vain at optimizer step `step`, on all ranks."""
    train_step: Callable[..., Any] = loop.train_step
    calls = 0

    def waiting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise StoppedWaitingError
        return train_step(*arguments, **options)

    loop.train_step = waiting
    try:
        return distil(tree=tree)
    finally:
        loop.train_step = train_step


def prompts(*, count: int, vocab: int = 101) -> list[list[int]]:
    """Prompts of uneven lengths."""
    generator = np.random.default_rng(3)
    return [generator.integers(3, vocab, 2 + place % 5).tolist() for place in range(count)]


def write_answers(
    *,
    student: str,
    gather: str,
    count: int,
    temperature: float,
    ends: tuple[int, ...] = (2,),
    checkpointing: bool = False,
    batch_size: int = 3,
) -> dict[str, Any]:
    """Every rank writes a contiguous share of the answers; then a training step's forward must still work."""
    side = build_side(teacher=student, student=student, checkpointing=checkpointing)
    ranks = current_ranks()
    model = side.student.model
    side.engine.train()
    writer = Writer(
        model,
        rule=DrawRule(ids=101, temperature=temperature),
        stops=StopTokens(ends=ends, fill=2),
        max_new_tokens=7,
        batch_size=batch_size,
        gather=gather,
        device=device(),
        ranks=ranks,
    )
    share = -(-count // ranks.world_size)
    first = min(ranks.rank * share, count)
    own = prompts(count=count)[first : first + share]
    questions = [Question(np.array(ids, np.int32), seed=(5, first + place)) for place, ids in enumerate(own)]
    before = resident_bytes(model)
    state = torch.get_rng_state()
    beats: list[int] = []
    answers = writer.write(questions, calls=-(-share // batch_size), beat=lambda: beats.append(1))
    result = {
        "ids": [answer.ids for answer in answers],
        "logq": [answer.logq for answer in answers],
        "ended": [answer.ended for answer in answers],
        "training": model.training,
        "leaked_bytes": resident_bytes(model) - before,
        "same_rng": bool(torch.equal(state, torch.get_rng_state())),
        "beats": len(beats),
    }
    side.close()
    dist.barrier()
    return result


def plain_answers(*, student: Path, count: int, ends: tuple[int, ...] = (2,)) -> list[list[int]]:
    """Greedy answers of plain transformers, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.generation_config.eos_token_id = list(ends)
    answers = []
    for ids in prompts(count=count):
        written = model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False, pad_token_id=2)
        answers.append(written[0, len(ids) :].tolist())
    return answers


def copy_model(*, student: str, precision: str) -> dict[str, Any]:
    """What a whole copy has in common with the sharded model."""
    side = build_side(teacher=student, student=student, precision=precision)
    model = side.student.model
    before = resident_bytes(model)
    with whole_copy(model, device=device()) as copy:
        during = resident_bytes(model)
        weights = {name: parameter.clone() for name, parameter in copy.named_parameters()}
        result = {
            "attention": copy.config._attn_implementation == model.config._attn_implementation,
            "plain": not any(is_sharded(parameter) for parameter in copy.parameters()),
            "tied": copy.get_output_embeddings().weight is copy.get_input_embeddings().weight,
            "eval": not copy.training,
            "buffers": all(torch.equal(a, b) for a, b in zip(copy.buffers(), model.buffers(), strict=True)),
        }
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            result[name] = bool(torch.equal(weights[name], parameter)) and weights[name].dtype == parameter.dtype
    result["bytes"] = before == during == resident_bytes(model) and whole_bytes(model) == sum(
        weight.numel() * weight.element_size() for weight in weights.values()
    )
    copyable = is_copyable(model)
    model.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    result["refused"] = copyable and not is_copyable(model)
    del model.model.extra
    side.close()
    return result
