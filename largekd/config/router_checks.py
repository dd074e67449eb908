"""Rules that join the keys of `objective.router` with others."""

import itertools
from collections.abc import Iterator

from largekd.config.run import RunConfig
from largekd.config.schedule import CurveConfig, extremes
from largekd.config.teacher import CachedTeacherConfig, RemoteTeacherConfig

ROUTER_TERMS = ("load_balance", "router_z", "router_kl")
"""Names of the router's terms in records, in the order of the loss."""


def check_router(config: RunConfig) -> Iterator[str]:
    """The rules that the values break, one line each; none without `objective.router`."""
    objective, router, kind = config.objective, config.objective.router, config.teacher.kind
    if router is None:
        return
    weights = {"balance": router.balance, "z": router.z}
    if router.distil is not None:
        weights["distil.weight"] = router.distil.weight
    for name, weight in weights.items():
        yield from _weight(weight, key=f"objective.router.{name}")
    for name in (entry.name for entry in itertools.chain(objective.features, objective.attention)):
        if name in ROUTER_TERMS:
            yield f"objective: a term of features or attention is called {name!r}, which is one of objective.router's"
    if kind == "self_shared":
        yield "objective.router: teacher.kind = 'self_shared' has no mixture of experts; remove it"
    if config.student.layer_drop is not None:
        yield "objective.router: student.layer_drop leaves layers with their routers out; remove one of the two"
    distil = router.distil
    if distil is None:
        return
    if isinstance(config.teacher, CachedTeacherConfig | RemoteTeacherConfig):
        yield f"objective.router.distil: teacher.kind = {kind!r} has no router in this job; use online, or remove it"
    if distil.pairs is not None and len(set(distil.pairs)) != len(distil.pairs):
        yield "objective.router.distil.pairs: a pair is named twice; name each once"
    if distil.pairs is not None and not distil.pairs:
        yield "objective.router.distil.pairs = []: name a pair, or null for all layers"
    if (
        isinstance(distil.expert_map, tuple)
        and min(distil.expert_map, default=-1) < 0
        and not any(expert >= 0 for expert in distil.expert_map)
    ):
        yield "objective.router.distil.expert_map: maps no expert; name at least one that is not -1"


def _weight(weight: float | CurveConfig, *, key: str) -> Iterator[str]:
    low, high = extremes(weight)
    if low < 0:
        shown = f"{key} = {weight}" if not isinstance(weight, CurveConfig) else f"{key}: runs from {low} to {high}"
        yield f"{shown}; it must be at least 0"
