"""Which layers of the student are left out: of a training step at random, of an evaluation or an export evenly."""

from dataclasses import dataclass

from largekd.config.layer_drop import LayerDropConfig
from largekd.config.run import RunConfig
from largekd.errors import ConfigError
from largekd.models.decoder import PROVEN_FAMILIES, Decoder
from largekd.models.depth import always_kept, draw_left_out, layers_at_depth
from largekd.objectives.alignment import Alignment
from largekd.objectives.schedules import value_at


@dataclass(frozen=True)
class LayerDrop:
    """Draws for a run: `always` are the layers that are never left out of `depth`."""

    config: LayerDropConfig
    depth: int
    always: frozenset[int]
    seed: int

    def rate(self, *, step: int, max_steps: int) -> float:
        """Probability at step `step` (0 is the first)."""
        return value_at(self.config.rate, step=step, max_steps=max_steps)

    def draw(self, *, step: int, max_steps: int, micro_batches: int) -> tuple[tuple[int, ...], ...]:
        """The layers that each of a step's micro-batches leaves out; equal on all ranks."""
        rate = self.rate(step=step, max_steps=max_steps)
        return tuple(
            draw_left_out(rate=rate, depth=self.depth, always=self.always, seed=self.seed, step=step, micro_batch=index)
            for index in range(micro_batches)
        )


def build_layer_drop(
    config: RunConfig, *, student: Decoder, alignment: Alignment | None, seed: int
) -> LayerDrop | None:
    """None where no layer is ever left out. Layers whose attention is compared never are.

    Errors: ConfigError for layers that do not exist or leave none to drop, and for a family that no test has seen.
    """
    if config.student.layer_drop is None:
        return None
    _check_family(student, key="student.layer_drop")
    depth = student.model.config.num_hidden_layers
    attended = frozenset[int]() if alignment is None else alignment.attended
    always = always_kept(config.student.layer_drop.protect, depth=depth, needed=attended)
    return LayerDrop(config.student.layer_drop, depth=depth, always=always, seed=seed)


def reduced_depths(config: RunConfig, *, student: Decoder) -> dict[int, tuple[int, ...]]:
    """Depth -> the layers that are left out there, for each of `eval.depths` and for `export.depth`.

    Errors: ConfigError.
    """
    depth = student.model.config.num_hidden_layers
    asked = {f"eval.depths.{index}": kept for index, kept in enumerate(config.eval.depths)}
    if config.export.depth is not None:
        asked["export.depth"] = config.export.depth
    found = {}
    for key, kept in asked.items():
        _check_family(student, key=key)
        layers = layers_at_depth(depth=kept, of=depth, key=key)
        found[kept] = tuple(layer for layer in range(depth) if layer not in layers)
    return found


def _check_family(student: Decoder, *, key: str) -> None:
    family = student.model.config.model_type
    if family not in PROVEN_FAMILIES:
        raise ConfigError(
            f"{key}: leaving layers out was not tried with a {family!r} model; set it to its default, or choose a "
            f"student of {', '.join(sorted(PROVEN_FAMILIES))}."
        )
