"""What the ranks do in the tests of rollouts: write answers with a sharded model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from step_jobs import build_side

from largekd.generation.sampling import DrawRule
from largekd.generation.writer import Question, StopTokens, Writer
from largekd.runtime.ranks import current_ranks
from largekd.sharding.accelerator import device
from largekd.sharding.shards import resident_bytes


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
