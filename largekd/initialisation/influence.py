"""Which of the teacher's layers a shorter student keeps, by how much each changes the residual stream."""

from torch import Tensor

from largekd.errors import ConfigError


def influential_layers(influence_N: Tensor, *, keep: int) -> tuple[int, ...]:
    """The first layer and the `keep` − 1 others of the greatest influence, in the teacher's order.

    influence_N: 1 − mean cosine of input and output. Layers of equal influence: the later ones go first. The first
    layer stays whatever its influence, because it alone has seen embeddings.
    Source: Men et al. 2024 (ShortGPT). Errors: ConfigError for more layers than there are.
    """
    depth = len(influence_N)
    if not 1 <= keep <= depth:
        raise ConfigError(
            f"student.initialise.layers = 'block_influence': the student has {keep} layers, the teacher {depth}; "
            "the student's number (num_hidden_layers of student.config, or student.design) must be from 1 to that."
        )
    scores: list[float] = influence_N.tolist()
    others = sorted(range(1, depth), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted([0, *others[: keep - 1]]))
