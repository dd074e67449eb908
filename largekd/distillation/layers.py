"""Which layers of the two models are compared: resolved from the configuration, measured where it asks for that."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from largekd.config.alignment import AdaptiveLayersConfig, AttentionConfig, FeatureConfig
from largekd.config.run import RunConfig
from largekd.config.schedule import extremes
from largekd.contracts import Batch, TapRequest
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.models.taps import attention_shape, check_layers, depth, hidden_width
from largekd.objectives.alignment import DecoderShape, check_attention_shapes
from largekd.objectives.features import FeaturePositions
from largekd.objectives.layer_maps import LayerPair, check_sample_pairs, pair_layers
from largekd.objectives.terms import Objective
from largekd.runtime.files import write_json
from largekd.runtime.ranks import Ranks, Together, all_sum
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathering_forward
from largekd.teachers.cache_taps import StoredLayers

logger = logging.getLogger(__name__)

LAYERS_FILE = "layer_pairs.json"

# Of each sample, the first so many positions are measured: its Gram matrices of all layers exist together.
_MEASURED_POSITIONS = 1024


def find_pairs(
    objective: Objective,
    *,
    config: RunConfig,
    student: Decoder,
    teacher: Decoder | StoredLayers | None,
    rows: Callable[[int], Iterator[Batch]],
    folder: Path,
    ranks: Ranks,
    kept: Sequence[int] | None = None,
    resumed: bool = False,
) -> dict[str, tuple[LayerPair, ...]]:
    """The pairs of each alignment term by its name, written to `folder` and logged. A collective call.

    teacher: its layers, or what a cache holds of them.
    rows: this rank's micro-batches of the first so many training rows, as adaptive maps look at. kept: the teacher's
    layer that each of the student's was made of. `resumed`: the student
    has learnt since the run's first start, and what was measured then is read again.
    Errors: ConfigError for layers that do not exist; TeacherError for those that a cache does not hold.
    """
    # Before the first checkpoint the file may be of a start with another configuration.
    if not (objective.features or objective.attention):
        return {}
    if teacher is None:
        raise ConfigError(
            f"objective.features, objective.attention: a teacher of kind {config.teacher.kind!r} has no layers in this "
            "job to compare with; use teacher.kind online or take these terms out."
        )
    if config.teacher.kind == "self_shared":
        kept = tuple(range(depth(student.model)))
    measured = _earlier(folder / LAYERS_FILE) if resumed else {}
    similarity: dict[int, Tensor] = {}
    pairs: dict[str, tuple[LayerPair, ...]] = {}
    for key, entry in _entries(objective.features, objective.attention):
        matrix = None
        if isinstance(entry.layers, AdaptiveLayersConfig) and entry.name not in measured:
            count = entry.layers.rows
            if count not in similarity:
                if isinstance(teacher, StoredLayers):
                    raise _not_stored(key)
                similarity[count] = _measure(rows(count), student=student, teacher=teacher)
            matrix = similarity[count]
        if isinstance(entry.layers, AdaptiveLayersConfig) and matrix is None:
            found = measured[entry.name]
        else:
            found = pair_layers(
                entry.layers,
                student_depth=depth(student.model),
                teacher_depth=_depth(teacher),
                kept=kept,
                similarity=matrix,
                key=key,
            )
        check_sample_pairs(entry.sample_pairs, pairs=found, key=key)
        for side, model in (("student", student), ("teacher", teacher)):
            _check(_asked(entry, pairs=found, side=side), model=model, key=f"{key}.layers ({side})")
        pairs[entry.name] = found
    _write(pairs, folder=folder, ranks=ranks)
    return pairs


def _check(request: TapRequest, *, model: Decoder | StoredLayers, key: str) -> None:
    if isinstance(model, StoredLayers):
        model.check(request, key=key)
    else:
        check_layers(request, model=model.model, key=key)


def _write(pairs: Mapping[str, tuple[LayerPair, ...]], *, folder: Path, ranks: Ranks) -> None:
    with Together():
        if ranks.is_main and pairs:
            write_json(folder / LAYERS_FILE, value={name: [list(p) for p in found] for name, found in pairs.items()})
            for name, found in pairs.items():
                logger.info(
                    "%s: student layers with their teacher layers %s", name, ", ".join(f"{s}-{t}" for s, t in found)
                )


def compared_layers(
    config: RunConfig, *, student_depth: int, teacher_depth: int, kept: Sequence[int] | None
) -> dict[str, TapRequest]:
    """What each alignment term compares of the teacher, by the term's key, where the depths alone decide it.

    kept: the teacher's layer that each of the student's is made of.
    Errors: ConfigError for layers that do not exist, and for maps that are measured.
    """
    objective = config.objective
    features = [entry for entry in objective.features if extremes(entry.weight)[1] > 0]
    attention = [entry for entry in objective.attention if extremes(entry.weight)[1] > 0]
    found = {}
    for key, entry in _entries(features, attention):
        if isinstance(entry.layers, AdaptiveLayersConfig):
            raise _not_stored(key)
        pairs = pair_layers(entry.layers, student_depth=student_depth, teacher_depth=teacher_depth, kept=kept, key=key)
        found[key] = _asked(entry, pairs=pairs, side="teacher")
    return found


def _asked(entry: FeatureConfig | AttentionConfig, *, pairs: Sequence[LayerPair], side: str) -> TapRequest:
    layers = tuple(sorted({getattr(pair, side) for pair in pairs}))
    return TapRequest(hidden=layers) if isinstance(entry, FeatureConfig) else TapRequest(attention=layers)


def _depth(model: Decoder | StoredLayers) -> int:
    return model.depth if isinstance(model, StoredLayers) else depth(model.model)


def _not_stored(key: str) -> ConfigError:
    return ConfigError(
        f"{key}.layers.map = 'adaptive': the layers are chosen when a run with both models starts, and a cache is made "
        f"of chosen ones; give the pairs of such a run ({LAYERS_FILE} in its folder) with map: explicit, or choose "
        "another map."
    )


def decoder_shape(
    model: Decoder | StoredLayers, *, side: str, pairs: Mapping[str, tuple[LayerPair, ...]], objective: Objective
) -> DecoderShape:
    """The widths and heads that alignment compares; `side` is student or teacher. Errors: ConfigError."""
    layers = sorted({getattr(pair, side) for entry in objective.attention for pair in pairs[entry.name]})
    if isinstance(model, StoredLayers):
        shapes = {layer: model.rules[layer].shape for layer in layers}
        return DecoderShape(model.depth, model.width, check_attention_shapes(shapes, key=side))
    decoder = model
    shapes = {layer: attention_shape(decoder.model, layer=layer) for layer in layers}
    return DecoderShape(
        depth=depth(decoder.model),
        width=hidden_width(decoder.model),
        attention=check_attention_shapes(shapes, key=side),
    )


def check_deep_layers(layers: Sequence[int], *, student: Decoder) -> None:
    """Errors: ConfigError for layers that the student does not have or that its final norm does not read."""
    if not layers:
        return
    key = "objective.deep_supervision.layers"
    check_layers(TapRequest(hidden=tuple(layers)), model=student.model, key=key)
    if depth(student.model) - 1 in layers:
        raise ConfigError(f"{key}: {depth(student.model) - 1} is the last layer, which is trained already; remove it.")
    if student.final_norm is None:
        raise ConfigError(
            f"{key}: the final norm of a {student.model.config.model_type!r} model was not found; take "
            "objective.deep_supervision out or choose another student."
        )


def _entries(
    features: Sequence[FeatureConfig], attention: Sequence[AttentionConfig]
) -> Iterator[tuple[str, FeatureConfig | AttentionConfig]]:
    for kind, entries in (("features", features), ("attention", attention)):
        for entry in entries:
            yield f"objective.{kind}.{entry.name}", entry


def _earlier(path: Path) -> dict[str, tuple[LayerPair, ...]]:
    if not path.is_file():
        return {}
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: tuple(LayerPair(*pair) for pair in found) for name, found in stored.items()}


def _measure(batches: Iterator[Batch], *, student: Decoder, teacher: Decoder) -> Tensor:
    """(student depth, teacher depth) linear CKA, the mean over the samples of all ranks."""
    depths = depth(student.model), depth(teacher.model)
    requests = [TapRequest(hidden=tuple(range(count))) for count in depths]
    total = torch.zeros(depths[0] * depths[1] + 1, dtype=torch.float64)
    with torch.no_grad(), _without_dropout(student, teacher):
        for batch in (batch.to(device=device()) for batch in batches):
            positions = FeaturePositions.of(batch)
            captured = []
            for decoder, request in zip((student, teacher), requests, strict=True):
                view = batch if decoder is student or batch.translation is None else batch.translation.teacher
                with gathering_forward(decoder):
                    captured.append(decoder.taps_of(decoder(batch=view, taps=request)).hidden)
            # Under a translation a micro-batch's groups are taken as one sample.
            everything = slice(0, positions.student_P.numel())
            for sample in positions.sample_ranges or (everything,):
                place = slice(sample.start, min(sample.stop, sample.start + _MEASURED_POSITIONS))
                if place.stop - place.start > 1:
                    sides = [
                        _grams(states, positions_P=places_P[place])
                        for states, places_P in zip(captured, (positions.student_P, positions.teacher_P), strict=True)
                    ]
                    cka = (sides[0] @ sides[1].T).double().cpu()
                    total += torch.cat([cka.flatten(), torch.ones(1, dtype=torch.float64)])
    total = all_sum(total.to(device())).cpu()
    return (total[:-1] / total[-1].clamp(min=1)).reshape(depths)


@contextmanager
def _without_dropout(*decoders: Decoder) -> Iterator[None]:
    modes = [decoder.training for decoder in decoders]
    try:
        for decoder in decoders:
            decoder.eval()
        yield
    finally:
        for decoder, mode in zip(decoders, modes, strict=True):
            decoder.train(mode)


def _grams(states: Mapping[int, Tensor], *, positions_P: Tensor) -> Tensor:
    """(layers, P²) centred Gram matrices of norm 1, whose products are linear CKA (Kornblith et al. 2019)."""
    rows = []
    for layer in sorted(states):
        rows_PD = states[layer].flatten(0, 1).index_select(0, positions_P).float()
        centred_PD = rows_PD - rows_PD.mean(0)
        gram_PP = centred_PD @ centred_PD.T
        rows.append((gram_PP / gram_PP.norm().clamp_min(torch.finfo(gram_PP.dtype).tiny)).flatten())
    return torch.stack(rows)
