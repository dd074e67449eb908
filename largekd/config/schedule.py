"""Values that change over a run: a number, or a curve over the share of the run that is done."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from largekd.config.common import Frozen


class CurveConfig(Frozen):
    """From `start` to `end` over a run, with an optional linear warm-up before and cool-down after."""

    shape: Literal["constant", "linear", "cosine", "exponential", "step"] = Field(
        "linear", description="constant stays at `start`; step moves in `stairs` equal jumps."
    )
    start: float = Field(description="Value after the warm-up.")
    end: float | None = Field(None, description="Value before the cool-down; null: `start`.")
    stairs: int = Field(4, ge=1, description="Jumps of the shape `step`.")
    warmup_frac: float = Field(0.0, ge=0, lt=1, description="Share of the run that rises from `warmup_from`.")
    warmup_from: float = Field(0.0, description="Value at the first step, if there is a warm-up.")
    cooldown_frac: float = Field(0.0, ge=0, lt=1, description="Share of the run that goes to `cooldown_to`.")
    cooldown_to: float = Field(0.0, description="Value at the last step, if there is a cool-down.")

    @property
    def last(self) -> float:
        """The value that the shape ends with."""
        return self.start if self.end is None or self.shape == "constant" else self.end

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value over the run: every shape is monotonic between its corners."""
        corners = [self.start, self.last]
        corners += [self.warmup_from] if self.warmup_frac else []
        corners += [self.cooldown_to] if self.cooldown_frac else []
        return min(corners), max(corners)


def _kind(value: Any) -> str:
    return "curve" if isinstance(value, dict | CurveConfig) else "number"


# Told apart by form, so that a mistake is told once: as one in a number, or as one in a curve.
Scheduled = Annotated[Annotated[float, Tag("number")] | Annotated[CurveConfig, Tag("curve")], Discriminator(_kind)]


def extremes(value: float | CurveConfig) -> tuple[float, float]:
    """The smallest and the largest value of a run."""
    return value.extremes if isinstance(value, CurveConfig) else (value, value)
