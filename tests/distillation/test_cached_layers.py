"""Alignment terms that learn from a cache: the online run's losses, and refusals that name layers."""

import json
import re

import pytest
from tiny_run import cache, changed, distil, from_cache, metrics, settings

from largekd.errors import LargeKDError

OBJECTIVE = {
    "alpha": 0.7,
    "features": [
        {"name": "hidden", "loss": "mse", "layers": {"map": "uniform"}},
        {"name": "drawn", "loss": "cka", "layers": {"map": "uniform"}, "sample_pairs": 1},
    ],
    "attention": [
        {"name": "maps", "loss": "kl", "layers": {"map": "last", "count": 1}},
        {"name": "relations", "loss": "relation", "relation_heads": 2, "layers": {"map": "last", "count": 1}},
    ],
}
NAMES = ("hidden", "drawn", "maps", "relations")
FULL = {"codec": {"kind": "hidden"}, "taps": {"precision": "fp32"}}
SPARSE = {"codec": {"kind": "top_k", "k": 64}}


def recipe(assets, folder, *, cache, name="run", **changes):
    tree = settings(assets, folder / name, log__tensorboard=False, eval__max_rows=2, objective=OBJECTIVE)
    return changed({**tree, "cache": {"path": str(folder / "cache"), "shard_samples": 40, **cache}}, **changes)


def records(folder, *, tree, pool):
    """The metrics of a run from the cache and of the same run with the online teacher."""
    found = []
    for name, own in (("cached", from_cache(tree)), ("online", tree)):
        pool.run(distil, tree=changed(own, run__dir=str(folder / name)))
        found.append(metrics(folder / name))
    assert len(found[0]) == len(found[1]) > 0
    return zip(*found, strict=True)


def refusal(*, tree, job):
    """For a rank pool: the message of a job that must refuse its configuration, and leaves the pool alive."""
    with pytest.raises(LargeKDError) as caught:
        job(tree=tree)
    return f"{type(caught.value).__name__}: {caught.value}"


def refused(pool, tree, message, *, job=distil):
    found = pool.run(refusal, tree=tree, job=job)
    assert all(re.search(message, text) for text in found), found


@pytest.fixture(scope="module")
def whole(tiny_assets, two_ranks, tmp_path_factory):
    """The folder around a cache of the whole distribution and the layers, in float32, that two ranks wrote."""
    folder = tmp_path_factory.mktemp("layers")
    two_ranks.run(cache, tree=recipe(tiny_assets, folder, cache=FULL))
    return folder


def test_a_run_from_the_cache_is_the_online_run(whole, tiny_assets, one_rank, tmp_path):
    """Two ranks wrote, one reads; packed, shuffled rows, of which the writer packed others."""
    tree = recipe(tiny_assets, whole, cache=FULL)
    for mine, theirs in records(tmp_path, tree=tree, pool=one_rank):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name in NAMES:
            assert mine[f"align/{name}"] == pytest.approx(theirs[f"align/{name}"], rel=1e-5)
            assert theirs[f"align/{name}"] > 0


def test_one_rank_writes_what_two_write_and_two_read_it(whole, tiny_assets, one_rank, two_ranks, tmp_path):
    one_rank.run(cache, tree=recipe(tiny_assets, tmp_path, cache=FULL))
    shards = [sorted(folder.glob("cache/*/shard_*.safetensors")) for folder in (tmp_path, whole)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]] != []
    manifests = [json.loads((folder / "cache/manifest.json").read_text()) for folder in (tmp_path, whole)]
    assert manifests[0] == manifests[1]
    assert manifests[0]["layers"]["hidden"] == [1, 3] and len(manifests[0]["layers"]["attention"]) == 1
    tree = recipe(tiny_assets, tmp_path, cache=FULL, data__packing=False)
    for mine, theirs in records(tmp_path, tree=tree, pool=two_ranks):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_in_the_writers_batch_shapes_every_bit_is_the_same(tiny_assets, one_rank, tmp_path):
    """A sample of its own in each micro-batch has one shape, whatever the order."""
    alone = {"data__packing": False, "train__micro_batch_size": 1, "train__global_batch_size": 4}
    tree = recipe(tiny_assets, tmp_path, cache=FULL, **alone)
    one_rank.run(cache, tree=tree)
    keys = ("loss", "optim/grad_norm", *(f"align/{name}" for name in NAMES))
    for mine, theirs in records(tmp_path, tree=tree, pool=one_rank):
        assert [mine[key] for key in keys] == [theirs[key] for key in keys]


def test_bf16_layers_beside_likeliest_ids(tiny_assets, one_rank, two_ranks, tmp_path):
    """Eight bits of mantissa; labels that are masked have layers all the same."""
    talks = [
        [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]
        for n in range(60)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    changes = {
        "data": {"train": {"path": str(tmp_path / "talks.jsonl")}},
        "objective__signal": {"kind": "top_k", "k": 64},
        "eval": {},
        "train__max_steps": 4,
    }
    tree = recipe(tiny_assets, tmp_path, cache=SPARSE, **changes)
    two_ranks.run(cache, tree=tree)
    (shard,) = json.loads((tmp_path / "cache/manifest.json").read_text())["shards"]["train"][:1]
    assert shard["positions"] > shard["tokens"] > 0
    for mine, theirs in records(tmp_path, tree=tree, pool=one_rank):
        for name in NAMES:
            assert mine[f"align/{name}"] == pytest.approx(theirs[f"align/{name}"], rel=2e-2)


def test_alignment_alone_reads_layers_alone(whole, tiny_assets, one_rank, tmp_path):
    tree = recipe(tiny_assets, whole, cache=FULL, objective={**OBJECTIVE, "alpha": 0.0}, eval={})
    for mine, theirs in records(tmp_path, tree=tree, pool=one_rank):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_layers_that_are_not_held_are_named(whole, tiny_assets, one_rank, two_ranks, tmp_path):
    run = {"run__dir": str(tmp_path / "run")}
    tree = from_cache(recipe(tiny_assets, whole, cache=FULL), **run)
    pairs = {"map": "explicit", "pairs": [[0, 2]]}
    other = {**OBJECTIVE, "features": [{"name": "hidden", "layers": pairs}], "attention": []}
    message = r"TeacherError: objective\.features\.hidden\.layers: .*hidden states.*layers 2; the cache holds 1, 3\."
    refused(two_ranks, changed(tree, objective=other), message)
    assert not (tmp_path / "run/deepspeed.json").exists()
    other = {**OBJECTIVE, "attention": [{"name": "maps", "layers": {"map": "explicit", "pairs": [[0, 0]]}}]}
    refused(one_rank, changed(tree, objective=other), r"objective\.attention\.maps.*layers 0; the cache holds 3\.")
    measured = {**OBJECTIVE, "features": [{"name": "hidden", "layers": {"map": "adaptive"}}]}
    message = r"ConfigError: objective\.features\.hidden\.layers\.map = 'adaptive'.*layer_pairs\.json.*map: explicit"
    refused(one_rank, changed(tree, objective=measured), message)
    caching = recipe(tiny_assets, tmp_path, cache=FULL, objective=measured)
    refused(one_rank, caching, message, job=cache)
    assert not (tmp_path / "cache/train").exists()


def test_a_cache_without_layers_says_how_to_get_them(tiny_assets, one_rank, tmp_path):
    tree = recipe(tiny_assets, tmp_path, cache={**FULL, "taps": None}, eval={})
    one_rank.run(cache, tree=tree)
    message = r"TeacherError: objective\.features\.hidden\.layers: .*the cache holds none.*cache\.taps=null"
    refused(one_rank, from_cache(tree), message)


def test_a_cache_of_a_run_in_stages_holds_the_layers_of_all(tiny_assets, one_rank, tmp_path):
    tree = recipe(tiny_assets, tmp_path, cache=FULL, train__max_steps=None)
    tree["optim"]["warmup_steps"] = 0
    feature = {"name": "hidden", "loss": "mse"}
    tree["stages"] = [
        {"name": name, "steps": 1, "set": {"objective": {
            "features": [feature | {"layers": {"map": "explicit", "pairs": [[0, layer]]}}], "attention": [],
        }}}
        for name, layer in (("low", 0), ("high", 2))
    ]  # fmt: skip
    one_rank.run(cache, tree=tree)
    held = json.loads((tmp_path / "cache/manifest.json").read_text())["layers"]
    assert held["hidden"] == [0, 2]
    one_rank.run(distil, tree=from_cache(tree))
