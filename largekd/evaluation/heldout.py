"""Held-out perplexity of student and teacher, and the student's distance to the teacher at temperature 1."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch

from largekd.contracts import HEALTH_NAMES, Batch, SignalRequest
from largekd.engine.train import TrainEngine
from largekd.monitoring.health import health_means, perplexity
from largekd.objectives.options import PassOptions
from largekd.runtime.ranks import all_sum
from largekd.teachers.protocol import Teacher

REDUCED = ("perplexity", "kl", "ce", "top1_agreement", "accuracy")
"""The figures that are given for reduced depths."""

NOWHERE: Mapping[int, Sequence[int]] = MappingProxyType({})

_CHUNK = 4  # micro-batches shown to the teacher at once: bounds the hidden states that are kept


def evaluate(
    batches: Iterable[Batch],
    *,
    engine: TrainEngine,
    teacher: Teacher,
    request: SignalRequest,
    n_terms: int,
    device: torch.device,
    depths: Mapping[int, Sequence[int]] = NOWHERE,
) -> dict[str, float]:
    """Means per counted token over all ranks: `perplexity`, `teacher_perplexity`, `kl` = KL(teacher || student) and
    `ce` in nats, `top1_agreement`, `accuracy`, `student_entropy`, `teacher_entropy`, `entropy_gap`; and `tokens`.

    With a teacher of another tokenizer the figures that need it are over the tokens that it has a signal for, and
    `kl` is between the outcomes of that signal.
    depths: also evaluate with these layers left out; those figures are `depth_<key>/…` of `REDUCED`.
    Every rank must bring the same number of batches; filler rows count nothing. A collective call.
    """
    totals = {depth: torch.zeros(len(HEALTH_NAMES), dtype=torch.float64, device=device) for depth in (None, *depths)}
    scales = torch.zeros(n_terms, device=device)
    engine.eval()
    with torch.no_grad():
        for group in _groups(batches):
            moved = [batch.to(device=device) for batch in group]
            with teacher.signals(moved, request=request) as signals:
                for batch in moved:
                    signal = next(signals)
                    for depth, total in totals.items():
                        options = PassOptions(measure=True, left_out=() if depth is None else depths[depth])
                        outputs = engine(batch=batch, signal=signal, scales=scales, options=options)
                        total += outputs["health"].double()
    engine.train()
    found = {depth: _figures(all_sum(total).tolist()) for depth, total in totals.items()}
    figures = found.pop(None)
    for depth, reduced in found.items():
        figures |= {f"depth_{depth}/{name}": reduced[name] for name in REDUCED}
    return figures


def _figures(health: Sequence[float]) -> dict[str, float]:
    sums = dict(zip(HEALTH_NAMES, health, strict=True))
    weight, mean = sums["token_weight"], health_means(sums)
    return {
        "tokens": weight,
        "perplexity": perplexity(mean["ce"]),
        "teacher_perplexity": perplexity(mean["teacher_ce"]),
        "kl": mean["kl_t1"],
        "ce": mean["ce"],
        "top1_agreement": mean["top1_agree"],
        "accuracy": mean["student_top1_correct"],
        "student_entropy": mean["student_entropy"],
        "teacher_entropy": mean["teacher_entropy"],
        "entropy_gap": mean["teacher_entropy"] - mean["student_entropy"],
    }


def _groups(batches: Iterable[Batch]) -> Iterable[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == _CHUNK:
            yield group
            group = []
    if group:
        yield group
