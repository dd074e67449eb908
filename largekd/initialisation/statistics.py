"""What calibration learns of a teacher: means over positions of real text, the same on every rank."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Means over `positions` of text; N layers, D hidden units, F neurons, H query heads. All float64 in host memory.

    units_D: mean |output| of the norms of the decoder layers and of the final norm, over norms: a hidden unit's
    importance. neurons_NF, heads_NH: by layer, mean |input| of the MLP's last projection, and mean Euclidean norm of a
    head's part of the input of the attention's last projection; None for a layer without one such projection.
    influence_N: 1 − mean cosine of a layer's input and output.
    energy_D: mean square of the residual stream over its own mean square, over the places where norms read it, so that
    it adds up to D. moment_DD: the second moment of the same, whose diagonal is energy_D; None: not asked for.

    Sources: importance by activations (Muralidharan et al. 2024, Minitron), influence of blocks (Men et al. 2024,
    ShortGPT), directions of the normalised stream (Ashkboos et al. 2024, SliceGPT).
    """

    positions: float
    units_D: Tensor
    energy_D: Tensor
    neurons_NF: tuple[Tensor | None, ...]
    heads_NH: tuple[Tensor | None, ...]
    influence_N: Tensor
    moment_DD: Tensor | None = None

    @property
    def depth(self) -> int:
        """Number of measured layers."""
        return len(self.influence_N)
