"""Caching jobs and runs on what they leave: equal to the online teacher whoever wrote it, refused where it differs."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file
from tiny_run import cache, changed, distil, distil_until, from_cache, metrics, settings

from largekd.errors import LargeKDError
from largekd.monitoring.summary import render_summary

HIDDEN = {"kind": "hidden"}
TOP_K = {"kind": "top_k", "k": 64, "temperatures": [1.0, 2.0]}
SAMPLED = {"kind": "sampled", "draws": 12}
SPARSE = {"kind": "top_k", "k": 64}


def recipe(assets, folder, *, codec, name="run", **changes):
    tree = settings(assets, folder / name, log__tensorboard=False, **changes)
    return {**tree, "cache": {"path": str(folder / "cache"), "codec": codec, "shard_samples": 40}}


def refusal(*, tree, job=distil):
    """For a rank pool: the message of a job that must refuse its configuration, and leaves the pool alive."""
    with pytest.raises(LargeKDError) as caught:
        job(tree=tree)
    return f"{type(caught.value).__name__}: {caught.value}"


def refused(pool, tree, message, **options):
    found = pool.run(refusal, tree=tree, **options)
    assert all(re.search(message, text) for text in found), found


@pytest.fixture(scope="module")
def caches(tiny_assets, two_ranks, tmp_path_factory):
    """`caches(codec)`: the folder around a cache that two ranks wrote."""
    made = {}

    def of(codec):
        kind = codec["kind"]
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            first, second = two_ranks.run(cache, tree=recipe(tiny_assets, made[kind], codec=codec))
            assert first == second is not None
        return made[kind]

    return of


def tensor_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("cache/*/shard_*.safetensors"))}


@pytest.mark.parametrize(
    "codec",
    [HIDDEN, *(pytest.param(codec, marks=pytest.mark.slow) for codec in (TOP_K, SAMPLED))],
    ids=lambda codec: codec["kind"],
)
def test_one_rank_writes_what_two_write(caches, tiny_assets, one_rank, tmp_path, codec):
    (digest,) = one_rank.run(cache, tree=recipe(tiny_assets, tmp_path, codec=codec))
    assert tensor_bytes(tmp_path) == tensor_bytes(caches(codec)) != {}
    manifest = json.loads((caches(codec) / "cache/manifest.json").read_text())
    assert manifest["digest"] == digest
    assert [len(manifest["shards"][origin]) for origin in ("train", "eval")] == [3, 1]


def test_hidden_states_are_the_online_teacher(caches, tiny_assets, two_ranks, tmp_path):
    """Evaluation has the writer's batch shapes, and there every bit is the same."""
    tree = recipe(tiny_assets, caches(HIDDEN), codec=HIDDEN, eval__max_rows=None)
    for name, own in (("online", tree), ("cached", from_cache(tree))):
        two_ranks.run(distil, tree=changed(own, run__dir=str(tmp_path / name)))
    online, cached = (metrics(tmp_path / name) for name in ("online", "cached"))
    for mine, theirs in zip(cached, online, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["health/kl_t1"] == pytest.approx(theirs["health/kl_t1"], rel=1e-5)
    before = [
        json.loads((tmp_path / name / "evaluation.jsonl").read_text().splitlines()[0]) for name in ("online", "cached")
    ]
    figures = [{key: value for key, value in record.items() if key.startswith("eval/")} for record in before]
    assert figures[0] == figures[1] and figures[0]["eval/kl"] > 0


@pytest.mark.parametrize(
    ("ranks", "k"), [(1, 16), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 64), (2, 64), (2, 16)))]
)
def test_top_k_is_the_online_teacher_within_its_bound(caches, tiny_assets, one_rank, two_ranks, tmp_path, ranks, k):
    """Padded rows, shuffled, two epochs, a temperature; read by one rank and by two."""
    pool = one_rank if ranks == 1 else two_ranks
    objective = {"alpha": 0.7, "temperature": 2.0, "signal": {"kind": "top_k", "k": k}}
    tree = recipe(
        tiny_assets,
        caches(TOP_K),
        codec=TOP_K,
        objective=objective,
        data__packing=False,
        train__max_steps=17,
        train__max_epochs=2,
    )
    for name, own in (("online", tree), ("cached", from_cache(tree))):
        pool.run(distil, tree=changed(own, run__dir=str(tmp_path / name)))
    online, cached = (metrics(tmp_path / name) for name in ("online", "cached"))
    assert len(cached) == 17
    for mine, theirs in zip(cached, online, strict=True):
        # The label stands among the cached ids, which is another split of the same distribution.
        assert mine["kd/forward_kl"] == pytest.approx(theirs["kd/forward_kl"], rel=0.05)
        assert mine["tokens"] == theirs["tokens"]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("online", "cached")]
    perplexities = [summary["eval"]["teacher"]["perplexity"] for summary in summaries]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=5e-3), "a label's own probability, not the tail's"


@pytest.mark.slow
def test_drawn_ids_train(caches, tiny_assets, two_ranks, tmp_path):
    objective = {"alpha": 1.0, "signal": {"kind": "sampled", "draws": 8}}
    tree = recipe(tiny_assets, caches(SAMPLED), codec=SAMPLED, objective=objective)
    summary, _ = two_ranks.run(distil, tree=from_cache(tree, run__dir=str(tmp_path / "run")))
    assert all(record["loss"] == record["loss"] for record in metrics(tmp_path / "run"))
    assert summary["eval"]["after"]["perplexity"] > 1 and render_summary(summary).count("not known") == 3


@pytest.mark.slow
def test_a_stopped_run_on_a_cache_resumes_bit_for_bit(caches, tiny_assets, two_ranks, tmp_path):
    tree = recipe(tiny_assets, caches(TOP_K), codec=TOP_K, objective={"alpha": 1.0, "signal": SPARSE})
    straight, stopped = (from_cache(tree, run__dir=str(tmp_path / name)) for name in ("straight", "stopped"))
    two_ranks.run(distil, tree=straight)
    assert two_ranks.run(distil_until, tree=stopped, step=3, rank=1) == [None, None]
    two_ranks.run(distil, tree=stopped)
    first, second = (load_file(tmp_path / name / "export/model.safetensors") for name in ("straight", "stopped"))
    assert all((first[name] == second[name]).all() for name in first)
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("straight", "stopped")]
    assert losses[0] == losses[1]


def test_a_student_of_its_own_needs_no_teacher(caches, tiny_assets, one_rank, tmp_path):
    """Configuration and tokenizer lie in the cache; other weights of samples are no other samples."""
    lines = (tiny_assets / "train.jsonl").read_text().splitlines()
    weighted = "".join(json.dumps({**json.loads(line), "w": 1 + n % 3}) + "\n" for n, line in enumerate(lines))
    (tmp_path / "train.jsonl").write_text(weighted)
    tree = recipe(tiny_assets, caches(HIDDEN), codec=HIDDEN, train__max_steps=2, optim__warmup_steps=0)
    own = from_cache(
        tree,
        model=False,
        run__dir=str(tmp_path / "run"),
        student={"config": str(tiny_assets / "teacher"), "deepspeed": tree["student"]["deepspeed"]},
        data__train={"path": str(tmp_path / "train.jsonl"), "weight_field": "w"},
    )
    (summary,) = one_rank.run(distil, tree=own)
    assert summary["steps"] == 2
    assert (tmp_path / "run/export/tokenizer.json").is_file()


REFUSED = {
    "sequence_length": (TOP_K, {"train__sequence_length": 48}, r"train\.sequence_length = 48.*made with 64"),
    "k": (TOP_K, {"objective__signal": {"kind": "top_k", "k": 65}}, r"objective\.signal\.k = 65.*64 ids"),
    "temperature": (TOP_K, {"objective__temperature": 3.0}, r"objective\.temperature = 3.*1, 2"),
    "curve": (TOP_K, {"objective__temperature": {"start": 2.0, "end": 1.0}}, r"objective\.temperature is a curve"),
    "full": (TOP_K, {"objective__signal": {"kind": "full"}}, r"objective\.signal\.kind = 'full'.*'top_k'"),
    "sampled": (TOP_K, {"objective__signal": {"kind": "sampled"}}, r"objective\.signal\.kind = 'sampled'"),
    "features": (
        HIDDEN,
        {"objective__features": [{"name": "h", "loss": "mse", "layers": {"map": "uniform"}}]},
        r"TeacherError: objective\.features\.h\.layers: .*the cache holds none",
    ),
    "data": (TOP_K, {"data__train": "eval"}, r"data\.train: these are not the samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cache_cannot_serve_is_refused_and_named(caches, tiny_assets, one_rank, tmp_path, name):
    codec, changes, message = REFUSED[name]
    if changes.get("data__train") == "eval":
        changes = {"data__train": {"path": str(tiny_assets / "eval.jsonl")}}
    signal = SPARSE if codec is TOP_K else {"kind": "full"}
    tree = recipe(tiny_assets, caches(codec), codec=codec, objective={"alpha": 1.0, "signal": signal})
    refused(one_rank, from_cache(tree, run__dir=str(tmp_path / "run"), **changes), message)


def test_another_teacher_and_another_tokenizer_are_refused(caches, tiny_assets, one_rank, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(tiny_assets / "teacher", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    tree = recipe(tiny_assets, caches(HIDDEN), codec=HIDDEN)
    run = {"run__dir": str(tmp_path / "run")}
    refused(one_rank, from_cache(tree, teacher__model=str(other), **run), r"TeacherError.*has other weights")
    message = r"TeacherError.*holds another cache.*teacher\.weights was"
    refused(one_rank, changed(tree, teacher__model=str(other)), message, job=cache)
    shutil.copytree(caches(HIDDEN) / "cache", tmp_path / "cache")
    path = tmp_path / "cache/teacher/tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["merges"] = described["model"]["merges"][:-1]
    path.write_text(json.dumps(described))
    student = {"config": str(tiny_assets / "teacher"), "deepspeed": tree["student"]["deepspeed"]}
    moved = from_cache(tree, model=False, teacher__path=str(tmp_path / "cache"), student=student, **run)
    refused(one_rank, moved, r"TeacherError.*tokenizer.*is not the one")


def test_another_chat_template_is_named(tiny_assets, one_rank, tmp_path):
    talks = [[{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(9)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (tmp_path / "other.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' + message['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    data = {"train": {"path": str(tmp_path / "talks.jsonl")}}
    tree = recipe(tiny_assets, tmp_path, codec=TOP_K, data=data, objective={"alpha": 1.0, "signal": SPARSE})
    tree = changed(tree, train__max_steps=3, eval={})
    one_rank.run(cache, tree=tree)
    one_rank.run(distil, tree=from_cache(tree))
    other = {"path": str(tmp_path / "talks.jsonl"), "chat_template": str(tmp_path / "other.jinja")}
    other_template = from_cache(tree, data__train=other, run__dir=str(tmp_path / "second"))
    refused(one_rank, other_template, r"DataError.*data\.train: the chat template")
    held_out = {"path": str(tiny_assets / "eval.jsonl")}
    with_eval = from_cache(tree, data__eval=held_out, run__dir=str(tmp_path / "third"))
    refused(one_rank, with_eval, r"DataError.*data\.eval: .*holds nothing")


def test_damaged_and_missing_shards_are_refused_and_made_again(caches, tiny_assets, one_rank, two_ranks, tmp_path):
    shutil.copytree(caches(TOP_K) / "cache", tmp_path / "cache")
    tree = recipe(tiny_assets, tmp_path, codec=TOP_K)
    damaged, missing = (tmp_path / f"cache/train/shard_0000{number}.safetensors" for number in (0, 2))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    missing.unlink()
    run = from_cache(tree, run__dir=str(tmp_path / "run"), objective={"alpha": 1.0, "signal": SPARSE})
    refused(two_ranks, run, r"TeacherError: .*shard_00002.*cannot be read.*launch/cache_teacher\.py")
    # All were looked at before anything was built.
    assert not (tmp_path / "run/deepspeed.json").exists()
    one_rank.run(cache, tree=tree)
    assert tensor_bytes(tmp_path) == tensor_bytes(caches(TOP_K))


def test_a_job_that_cannot_be_cached_says_why(tiny_assets, one_rank, tmp_path):
    refused(one_rank, settings(tiny_assets, tmp_path / "run"), r"ConfigError: cache: set cache\.path", job=cache)
    tree = from_cache(recipe(tiny_assets, tmp_path, codec=TOP_K), model=False)
    refused(one_rank, tree, r"ConfigError.*student\.teacher_layers: a cache has no weights.*teacher\.model")
