"""Values that change over a run, as a pure function of progress: nothing to save, nothing to resume."""

import math

from largekd.config.schedule import CurveConfig

# A stair that is due at a step begins there, whatever the rounding of step / max_steps.
_ROUNDING = 1e-9


def value_at(value: float | CurveConfig, *, step: int, max_steps: int) -> float:
    """The value for optimizer step `step` (0 is the first) of `max_steps`; a number is itself.

    With x = step / (max_steps − 1) in [0, 1] (0 in a run of one step), w = warmup_frac, c = cooldown_frac:
    x < w: linear from warmup_from to start. x > 1 − c: linear from the shape's last value to cooldown_to.
    Between them the shape at u = (x − w) / (1 − c − w), from a = start to b = end:
    constant: a; linear: a + (b − a) · u; cosine: a + (b − a) · (1 − cos(π·u)) / 2; exponential: a · (b / a)^u;
    step: a + (b − a) · k / stairs with k = floor(u · (stairs + 1)), at most stairs, so that the last stair is at b.
    The ends of all three parts are exact. A step beyond the last has the last value.
    """
    if not isinstance(value, CurveConfig):
        return value
    assert step >= 0, f"step {step} is before the first"
    x = min(step / max(max_steps - 1, 1), 1.0)
    warmup, cooldown = value.warmup_frac, value.cooldown_frac
    if x < warmup:
        return _between(value.warmup_from, value.start, share=x / warmup)
    # The distance to the end, not from the cool-down's begin: only so is the last value exact.
    if x > 1.0 - cooldown:
        return _between(value.cooldown_to, value.last, share=(1.0 - x) / cooldown)
    span = 1.0 - cooldown - warmup
    return _shape(value, u=min((x - warmup) / span, 1.0) if span > 0 else 1.0)


def _shape(curve: CurveConfig, *, u: float) -> float:
    start, last = curve.start, curve.last
    if u >= 1.0:
        return last
    match curve.shape:
        case "constant":
            return start
        case "linear":
            return _between(start, last, share=u)
        case "cosine":
            return _between(start, last, share=(1.0 - math.cos(math.pi * u)) / 2.0)
        case "exponential":
            return start * (last / start) ** u
        case "step":
            jumps = math.floor(u * (curve.stairs + 1) + _ROUNDING)
            return _between(start, last, share=min(jumps, curve.stairs) / curve.stairs)


def _between(start: float, end: float, *, share: float) -> float:
    """start + (end − start) · share, without rounding at both ends and where they are equal."""
    if start == end:
        return start
    return (1.0 - share) * start + share * end
