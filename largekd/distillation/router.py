"""The router terms of a run: which layers have routers, which of them are compared, and over which experts."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from largekd.config.alignment import UniformLayersConfig
from largekd.config.router import RouterDistillConfig
from largekd.contracts import TapRequest
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.models.router import RouterShape
from largekd.models.taps import check_layers, depth, routers_of
from largekd.objectives.layer_maps import LayerPair, pair_layers
from largekd.objectives.router import DISTIL, RouterPair, RouterTerms, expert_places
from largekd.objectives.terms import Objective
from largekd.sharding.accelerator import device

logger = logging.getLogger(__name__)

_KEY = "objective.router"


def build_router(
    objective: Objective,
    *,
    student: Decoder,
    teacher: Decoder | None,
    teacher_kind: str,
    kept: Sequence[int] | None = None,
) -> RouterTerms | None:
    """The terms of `objective.router`; None without it. kept: the teacher's layer that each of the student's was.

    Errors: ConfigError for a student without routers, layers that have none, and experts that do not map.
    """
    if objective.config.router is None:
        return None
    shapes = routers_of(student.model)
    own = _one_shape(shapes, side="student", model_type=student.model.config.model_type)
    distil = objective.config.router.distil
    options: dict[str, object] = {}
    if distil is not None and DISTIL in objective.router_terms:
        if teacher is None:
            raise ConfigError(
                f"{_KEY}.distil: a teacher of kind {teacher_kind!r} has no router in this job to compare with; "
                "use teacher.kind online or remove it."
            )
        theirs = _one_shape(routers_of(teacher.model), side="teacher", model_type=teacher.model.config.model_type)
        layers = _pairs(distil, student=student, teacher=teacher, kept=kept)
        pairs = _with_experts(distil, layers=layers, student=own.experts, teacher=theirs.experts)
        options = {"pairs": pairs, "teacher_scoring": theirs.scoring}
        logger.info("routers: student layers with their teacher layers %s", ", ".join(f"{s}-{t}" for s, t in layers))
    return RouterTerms(
        terms=objective.router_terms,
        layers=tuple(shapes),
        experts=own.experts,
        scoring=own.scoring,
        **options,  # type: ignore[arg-type]
    )


def _one_shape(shapes: Mapping[int, RouterShape], *, side: str, model_type: str) -> RouterShape:
    """The shape that all routers of a model have."""
    if not shapes:
        raise ConfigError(
            f"{_KEY}: the {side}, a {model_type!r} model, has no router that was found; remove the key or choose a "
            "mixture-of-experts model."
        )
    first_layer, first = next(iter(shapes.items()))
    for layer, shape in shapes.items():
        if shape != first:
            raise ConfigError(
                f"{_KEY}: the routers of layers {first_layer} and {layer} of the {side} differ ({first} and {shape}), "
                "which is not supported; remove the key."
            )
    return first


def _pairs(
    distil: RouterDistillConfig, *, student: Decoder, teacher: Decoder, kept: Sequence[int] | None
) -> tuple[LayerPair, ...]:
    key = f"{_KEY}.distil.pairs"
    own, theirs = routers_of(student.model), routers_of(teacher.model)
    if distil.pairs is not None:
        pairs = tuple(LayerPair(*pair) for pair in distil.pairs)
    elif kept is not None:
        pairs = tuple(LayerPair(layer, kept[layer]) for layer in own if kept[layer] in theirs)
    else:
        found = pair_layers(
            UniformLayersConfig(),
            student_depth=depth(student.model),
            teacher_depth=depth(teacher.model),
            kept=None,
            key=key,
        )
        pairs = tuple(pair for pair in found if pair.student in own and pair.teacher in theirs)
    if not pairs:
        raise ConfigError(f"{key} = null: no layer with a router has a counterpart with one; name the pairs.")
    for side, decoder in (("student", student), ("teacher", teacher)):
        layers = tuple(sorted({getattr(pair, side) for pair in pairs}))
        check_layers(TapRequest(router=layers), model=decoder.model, key=f"{key} ({side})")
    return pairs


def _with_experts(
    distil: RouterDistillConfig, *, layers: Sequence[LayerPair], student: int, teacher: int
) -> tuple[RouterPair, ...]:
    maps = _expert_maps(distil, layers=layers)
    found = []
    for pair in layers:
        _check_map(maps[pair.student], student=student, teacher=teacher, layer=pair.student)
        compared, sides = expert_places(maps[pair.student], student=student, teacher=teacher)
        found.append(RouterPair(pair, compared, **{name: _placed(places) for name, places in sides.items()}))
    return tuple(found)


def _placed(places: Tensor | None) -> Tensor | None:
    return None if places is None else places.to(device())


def _expert_maps(distil: RouterDistillConfig, *, layers: Sequence[LayerPair]) -> dict[int, tuple[int, ...] | None]:
    """The map of each student layer. Errors: ConfigError for a file that is no such table."""
    given = distil.expert_map
    if not isinstance(given, str):
        return {pair.student: given for pair in layers}
    key, path = f"{_KEY}.distil.expert_map", Path(given).expanduser()
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} = {given!r}: cannot be read as JSON ({error}).") from error
    maps: dict[int, tuple[int, ...] | None] = {}
    for layer in sorted({pair.student for pair in layers}):
        experts = tree.get(str(layer)) if isinstance(tree, dict) else None
        if not isinstance(experts, list) or not all(type(expert) is int for expert in experts):
            raise ConfigError(
                f"{key} = {given!r}: has no list of expert indices under {str(layer)!r}; it must be an object of "
                "student layers, each with such a list."
            )
        maps[layer] = tuple(experts)
    return maps


def _check_map(expert_map: tuple[int, ...] | None, *, student: int, teacher: int, layer: int) -> None:
    """Errors: ConfigError for a map that does not fit the two models."""
    key, smaller = f"{_KEY}.distil.expert_map", min(student, teacher)
    counts = f"the student has {student} experts and the teacher {teacher}"
    if expert_map is None:
        if student != teacher:
            raise ConfigError(f"{key} = null: {counts}; say which of them correspond.")
        return
    if len(expert_map) != max(student, teacher):
        raise ConfigError(
            f"{key} (student layer {layer}) has {len(expert_map)} entries: {counts}; it needs {max(student, teacher)}, "
            "one for each expert of the model with more of them."
        )
    wrong = [expert for expert in expert_map if not -1 <= expert < smaller]
    if wrong or max(expert_map) < 0:
        named = f"{wrong[0]} is no expert" if wrong else "no expert is mapped"
        raise ConfigError(f"{key} (student layer {layer}): {named}; give 0 to {smaller - 1}, or -1 for none.")
