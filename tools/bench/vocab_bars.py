"""The bars of the vocabulary pass: what is compared with what, and what must be reached."""

import statistics
from collections.abc import Iterable
from typing import Any

MEMORY = (
    ("ours", "hf_fp32", 1 / 13),
    ("ours", "full_bf16", 1 / 6.5),
    ("ours", "liger_256", 0.65),
    ("ours", "trl_chunked", 1 / 6),
    ("ours_low_memory", "liger_256", 0.40),
)
SPEED = (
    ("ours", "full_bf16", 0.50),
    ("ours", "liger_256", 0.45),
    ("ours", "trl_chunked", 1 / 5),
    ("ours", "matmul_floor", 1 / 0.60),
    ("ours_compiled", "matmul_floor", 1 / 0.80),
)
LOSS_ERROR = 2e-5
GRADIENT_ERROR = 2**-8


def median(values: Iterable[float], /) -> float:
    """The median of a few measurements."""
    return statistics.median(values)


def judge(report: dict[str, Any], /, *, judged: tuple[str, ...], speed: bool) -> list[dict[str, str]]:
    """One record per bar. Without `speed` (a small cell) only the loss is judged."""
    runs = report["named"]["one_thread"]
    bars = [_ratio(runs, "P1", "memory", "peak_bytes", *bar, counts=speed) for bar in MEMORY]
    bars += [_ratio(runs, "P2", "CPU time", "cpu_s", *bar, counts=speed) for bar in SPEED]
    growth = report["growth"]
    bars.append(
        _bar("P3", "bytes per token beyond the head's gradient", growth["slope"], growth["limit"], counts=speed)
    )
    mine = [record for record in report["accuracy"] if record["contender"] in judged]
    loss_error = max(record["loss_error"] for record in mine)
    bars.append(_bar("P4", "relative error of the loss", loss_error, LOSS_ERROR, counts=True))
    for divergence in dict.fromkeys(record["divergence"] for record in mine):
        error = max(record["gradient_error"] for record in mine if record["divergence"] == divergence)
        bars.append(
            _bar("P4", f"relative L2 error of the gradients, {divergence}", error, GRADIENT_ERROR, counts=speed)
        )
    return bars


def _ratio(
    runs: dict[str, Any], bar: str, what: str, field: str, mine: str, other: str, limit: float, /, *, counts: bool
) -> dict[str, str]:
    """Median over rounds of the ratio within a round, so that a slow moment of the machine hits both sides."""
    text = f"{what}, {mine} / {other}"
    if other not in runs:
        return {"bar": bar, "text": text, "found": "-", "must": f"<= {limit:.3g}", "verdict": "not measured"}
    pairs = zip(runs[mine], runs[other], strict=True)
    return _bar(bar, text, median(a[field] / b[field] for a, b in pairs), limit, counts=counts)


def _bar(bar: str, text: str, found: float, limit: float, /, *, counts: bool) -> dict[str, str]:
    verdict = "passed" if found <= limit else "MISSED"
    return {
        "bar": bar,
        "text": text,
        "found": f"{found:.3g}",
        "must": f"<= {limit:.3g}",
        "verdict": verdict if counts else "not judged",
    }
