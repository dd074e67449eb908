"""A step with alignment terms, written out with plain transformers models in one process, in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tiny import join_rows, make_rows
from torch import Tensor
from torch.nn import functional as F

from largekd.contracts import Batch, Segment

Pairs = Mapping[str, Sequence[tuple[int, int]]]


def aligned_rows(*, count: int, packed: bool, seed: int = 0) -> list[Batch]:
    """The rows of `make_rows` with their samples known: one in a padded row, three in a packed one, one of length 1."""
    rows = []
    for index, row in enumerate(make_rows(count=count, packed=packed, seed=seed)):
        width, used = row.input_ids_BS.shape[1], row.segments[0][0].length
        split = 5 + index % 7
        lengths = [split, 1, used - split - 1] if packed else [used]
        segments, segment_S, offset = [], torch.zeros(width, dtype=torch.long), 0
        for number, length in enumerate(lengths):
            segments.append(Segment(3 * index + number, offset, length))
            segment_S[offset : offset + length] = number + 1
            offset += length
        positions = torch.cat([torch.arange(length) for length in (*lengths, width - used)])[None]
        rows.append(
            replace(
                row,
                segments=(tuple(segments),),
                segment_BS=segment_S[None],
                position_ids_BS=positions if packed else None,
            )
        )
    return rows


def join(rows: Sequence[Batch]) -> Batch:
    """`join_rows`, with the samples' numbers."""
    return replace(
        join_rows(rows), segment_BS=torch.cat([row.segment_BS for row in rows if row.segment_BS is not None])
    )


class Traced:
    """A plain model in float64 whose forward gives logits, layer outputs, attention maps, and queries, keys, values."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64, attn_implementation="eager")
        self._seen: dict[str, Tensor] = {}
        for place, layer in enumerate(self.model.model.layers):
            for letter in "qkv":
                getattr(layer.self_attn, f"{letter}_proj").register_forward_hook(
                    lambda _m, _i, output, key=f"{letter}{place}": self._seen.__setitem__(key, output)
                )
        self.model.model.norm.register_forward_pre_hook(lambda _m, inputs: self._seen.__setitem__("last", inputs[0]))

    def __call__(self, row: Batch) -> dict[str, Any]:
        found = self.model(**row.model_inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
        # The last entry of hidden_states has passed the final norm, which a layer's output has not.
        return {
            "logits": found.logits[0],
            "hidden": [*(states[0] for states in found.hidden_states[1:-1]), self._seen["last"][0]],
            "maps": [maps[0] for maps in found.attentions],
            "qkv": [self._rotated(place, row) for place in range(len(found.attentions))],
        }

    def _rotated(self, layer: int, row: Batch) -> dict[str, Tensor]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        config, positions = self.model.config, row.position_ids_BS
        if positions is None:
            positions = torch.arange(row.input_ids_BS.shape[1])[None]
        query, key, value = (
            self._seen[f"{letter}{layer}"].unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for letter in "qkv"
        )
        query, key = apply_rotary_pos_emb(query, key, *self.model.model.rotary_emb(value, positions))
        repeats = config.num_attention_heads // config.num_key_value_heads
        return {
            "q": query[0],
            "k": key[0].repeat_interleave(repeats, dim=0),
            "v": value[0].repeat_interleave(repeats, dim=0),
        }


def reference_step(
    *,
    teacher: str,
    student: str,
    objective: Mapping[str, Any],
    rows: Sequence[Batch],
    weights: Mapping[str, Tensor],
    pairs: Pairs,
    all_pairs: Pairs,
) -> dict[str, Any]:
    """Loss and gradients of one step; `weights` are those of student and alignment, under their names in training.

    pairs: of each term, those that take part, among `all_pairs`. Gradients of what takes no part are None.
    """
    models = {"teacher": Traced(teacher), "student": Traced(student)}
    own = {name: weights[name].double().requires_grad_() for name in weights if name.startswith("alignment.")}
    for name, parameter in models["student"].model.named_parameters():
        parameter.data.copy_(weights[name])
    counts = {
        "positions": sum(s.length for row in rows for s in row.segments[0]),
        "samples": sum(s.length > 1 for row in rows for s in row.segments[0]),
        "tokens": sum(float(row.token_weight_BS.flatten()[row.counted_T].sum()) for row in rows),
    }
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        with torch.no_grad():
            theirs = models["teacher"](row)
        mine = models["student"](row)
        total = total + vocabulary_loss(mine, theirs, row, alpha=objective["alpha"]) / counts["tokens"]
        for entry in (*objective.get("features", ()), *objective.get("attention", ())):
            count = counts["samples" if entry["loss"] == "cka" else "positions"]
            active, known = pairs[entry["name"]], all_pairs[entry["name"]]
            found = term_sum(entry, mine, theirs, row, own=own, pairs=active, all_pairs=known)
            total = total + entry.get("weight", 1.0) * found / float(count)
    total.backward()
    gradients = {name: p.grad.float() for name, p in models["student"].model.named_parameters()}
    gradients |= {name: weight.grad for name, weight in own.items()}
    return {"loss": float(total.detach()), "count": counts["tokens"], "gradients": gradients}


def term_square(
    entry: Mapping[str, Any],
    *,
    teacher: str,
    student: str,
    rows: Sequence[Batch],
    weights: Mapping[str, Tensor],
    pairs: Sequence[tuple[int, int]],
) -> float:
    """Squared norm of the gradient of a features' term with respect to the hidden states that it compares."""
    models = [Traced(name) for name in (teacher, student)]
    own = {name: weight.double() for name, weight in weights.items() if name.startswith("alignment.")}
    count, total = sum(s.length for row in rows for s in row.segments[0]), 0.0
    for row in rows:
        with torch.no_grad():
            theirs, mine = (model(row) for model in models)
        leaves = {"hidden": [states.clone().requires_grad_() for states in mine["hidden"]]}
        found = term_sum(entry, leaves, theirs, row, own=own, pairs=pairs, all_pairs=pairs)
        (entry.get("weight", 1.0) / count * found).backward()
        total += sum(float(leaf.grad.square().sum()) for leaf in leaves["hidden"] if leaf.grad is not None)
    return total


def vocabulary_loss(mine: Mapping[str, Any], theirs: Mapping[str, Any], row: Batch, *, alpha: float) -> Tensor:
    """Σ weight · ((1 − α)·CE + α·KL(teacher ‖ student)) at temperature 1."""
    logq, logp = (side["logits"][row.counted_T].log_softmax(-1) for side in (mine, theirs))
    label = row.labels_BS.flatten()[row.counted_T]
    hard = -logq.gather(-1, label[:, None])[:, 0]
    soft = (logp.exp() * (logp - logq)).sum(-1)
    weight = row.token_weight_BS.flatten()[row.counted_T].double()
    return (weight * ((1 - alpha) * hard + alpha * soft)).sum()


def term_sum(
    entry: Mapping[str, Any],
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    row: Batch,
    *,
    own: Mapping[str, Tensor],
    pairs: Sequence[tuple[int, int]],
    all_pairs: Sequence[tuple[int, int]],
) -> Tensor:
    """An alignment term's sum over a row, averaged over `pairs`."""
    prefix = f"alignment.terms.{entry['name']}."
    parts = {name.removeprefix(prefix): weight for name, weight in own.items() if name.startswith(prefix)}
    sums = []
    for pair in pairs:
        if "projector" in entry:
            sums.append(_features(entry, mine["hidden"][pair[0]], theirs["hidden"][pair[1]], row, parts, pair))
        elif entry["loss"] == "relation":
            sums.append(_relations(entry, mine["qkv"][pair[0]], theirs["qkv"][pair[1]], row))
        else:
            weight_H = parts["head_weights.logits_PH"][list(all_pairs).index(pair)].softmax(0) if parts else None
            sums.append(_maps(entry, mine["maps"][pair[0]], theirs["maps"][pair[1]], row, weight_H))
    return torch.stack(sums).mean()


def _features(entry: Any, s_SD: Tensor, t_SE: Tensor, row: Batch, parts: Any, pair: tuple[int, int]) -> Tensor:
    name, kind = f"{pair[0]}_{pair[1]}", entry["projector"]["kind"]
    shared = entry["projector"].get("shared", kind == "low_rank_identity")
    own = _under(f"projectors.{'shared' if shared else name}.", parts)
    width = t_SE.shape[1]
    if kind == "pool":
        width = min(s_SD.shape[1], width)
        s_SD, t_SE = (F.adaptive_avg_pool1d(x, width) for x in (s_SD, t_SE))
    elif kind == "linear":
        s_SD = F.linear(s_SD, own["map.weight"], own.get("map.bias"))
    elif kind == "mlp":
        s_SD = _two_layers(s_SD, _under("map.", own))
    elif kind == "low_rank_identity":
        s_SD = s_SD @ torch.eye(s_SD.shape[1], width, dtype=s_SD.dtype) + s_SD @ own["down_RD"].T @ own["up_ER"].T
    else:
        assert kind == "none"
    if entry["loss"] == "predictive":
        s_SD = _two_layers(s_SD, _under(f"predictors.{name}.", parts))
    total = torch.zeros((), dtype=s_SD.dtype)
    for segment in row.segments[0]:
        place = slice(segment.offset, segment.offset + segment.length)
        total = total + _distance(entry["loss"], s_SD[place], t_SE[place])
    return total


def _distance(loss: str, s_PF: Tensor, t_PF: Tensor) -> Tensor:
    if loss == "mse":
        return (s_PF - t_PF).square().mean(1).sum()
    if loss == "normalised_mse":
        s_PF, t_PF = (
            (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-8).sqrt() for x in (s_PF, t_PF)
        )
        return (s_PF - t_PF).square().mean(1).sum()
    if loss in ("cosine", "predictive"):
        cosine = (s_PF * t_PF).sum(1) / (s_PF.norm(dim=1) * t_PF.norm(dim=1))
        return (1 - cosine).sum() * (2 if loss == "predictive" else 1)
    assert loss == "cka"
    if len(s_PF) == 1:
        return s_PF.new_zeros(())
    s_PF, t_PF = s_PF - s_PF.mean(0), t_PF - t_PF.mean(0)
    return 1 - (t_PF.T @ s_PF).square().sum() / ((s_PF.T @ s_PF).norm() * (t_PF.T @ t_PF).norm())


def _under(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in parts.items() if name.startswith(prefix)}


def _two_layers(x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    return F.linear(F.gelu(F.linear(x, own["inner.weight"], own["inner.bias"])), own["outer.weight"], own["outer.bias"])


def _maps(entry: Any, s_HQK: Tensor, t_HQK: Tensor, row: Batch, weight_H: Tensor | None) -> Tensor:
    low, high = sorted((len(s_HQK), len(t_HQK)))
    matched = []
    for maps in (s_HQK, t_HQK):
        if entry.get("match_heads", "group") == "repeat":
            matched.append(maps.repeat_interleave(high // len(maps), dim=0))
        else:
            matched.append(maps.unflatten(0, (low, -1)).mean(1))
    return _row_losses(entry["loss"], *matched, row=row, weight_H=weight_H)


def _row_losses(loss: str, s_HQK: Tensor, t_HQK: Tensor, *, row: Batch, weight_H: Tensor | None = None) -> Tensor:
    real_Q = row.segment_BS[0] > 0  # type: ignore[index]
    s_HQK, t_HQK = s_HQK[:, real_Q], t_HQK[:, real_Q]
    if loss == "kl":
        seen = t_HQK > 0
        rows_HQ = torch.where(seen, t_HQK * (t_HQK.where(seen, 1.0) / s_HQK.where(seen, 1.0)).log(), 0.0).sum(-1)
    else:
        rows_HQ = 1 - F.cosine_similarity(s_HQK, t_HQK, dim=-1)
        rows_HQ = rows_HQ * (2 if loss == "mse" else 1)
    return rows_HQ.mean(0).sum() if weight_H is None else (weight_H[:, None] * rows_HQ).sum()


def _relations(entry: Any, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], row: Batch) -> Tensor:
    segment_S = row.segment_BS[0]  # type: ignore[index]
    seen_QK = (segment_S[:, None] == segment_S) & torch.ones(len(segment_S), len(segment_S)).tril().bool()
    sums = []
    for relation in entry["relations"]:
        maps = []
        for side in (mine, theirs):
            x_RSd, y_RSd = (
                side[letter].transpose(0, 1).flatten(1).unflatten(1, (entry["relation_heads"], -1)).transpose(0, 1)
                for letter in relation
            )
            score = x_RSd @ y_RSd.transpose(1, 2) / x_RSd.shape[-1] ** 0.5
            maps.append(score.masked_fill(~seen_QK, -torch.inf).softmax(-1))
        sums.append(_row_losses("kl", *maps, row=row))
    return torch.stack(sums).mean()
