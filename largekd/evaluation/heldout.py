"""Held-out perplexity of student and teacher, and the student's distance to the teacher at temperature 1."""

from collections.abc import Iterable, Mapping

import torch

from largekd.contracts import HEALTH_NAMES, Batch, SignalRequest
from largekd.engine.train import TrainEngine
from largekd.monitoring.health import health_means, perplexity
from largekd.runtime.ranks import all_sum
from largekd.teachers.protocol import Teacher

_CHUNK = 4  # micro-batches shown to the teacher at once: bounds the hidden states that are kept


def evaluate(
    batches: Iterable[Batch],
    *,
    engine: TrainEngine,
    teacher: Teacher,
    request: SignalRequest,
    n_terms: int,
    device: torch.device,
) -> dict[str, float]:
    """Means per counted token over all ranks: `perplexity`, `teacher_perplexity`, `kl` = KL(teacher || student) and
    `ce` in nats, `top1_agreement`, `accuracy`, `student_entropy`, `teacher_entropy`, `entropy_gap`; and `tokens`.

    With a teacher of another tokenizer the figures that need it are over the tokens that it has a signal for, and
    `kl` is between the outcomes of that signal.
    Every rank must bring the same number of batches; filler rows count nothing. A collective call.
    """
    total = torch.zeros(len(HEALTH_NAMES), dtype=torch.float64, device=device)
    scales = torch.zeros(n_terms, device=device)
    engine.eval()
    with torch.no_grad():
        for group in _groups(batches):
            moved = [batch.to(device=device) for batch in group]
            with teacher.signals(moved, request=request) as signals:
                for batch in moved:
                    outputs = engine(batch=batch, signal=next(signals), scales=scales, measure=True)
                    total += outputs["health"].double()
    engine.train()
    sums = dict(zip(HEALTH_NAMES, all_sum(total).tolist(), strict=True))
    return _figures(sums)


def _figures(sums: Mapping[str, float]) -> dict[str, float]:
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
