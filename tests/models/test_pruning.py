"""Which units go and when, and that what is exported computes what the masked student computes."""

import pytest
import self_shared_jobs as jobs
import torch
from tiny import join_rows, make_rows

from largekd.config.objective import ObjectiveConfig
from largekd.distillation import self_shared
from largekd.errors import ConfigError
from largekd.models.adapters import check_family
from largekd.models.pruning import check_targets, cubic_sparsity, keep_salient, kept_count
from largekd.objectives.layer_maps import pair_layers
from largekd.objectives.terms import build_objective

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "initializer_range": 0.1,
}


def _save(family, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    width = {"head_dim": 12} if family == "qwen3" else {}
    config = AutoConfig.for_model(family, **SIZES, **width, tie_word_embeddings=family != "mistral")
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return _save("llama", tmp_path_factory.mktemp("pruning") / "llama")


def test_the_curve_is_cubic():
    assert cubic_sparsity(0.8, done=0.0) == 0.0
    assert cubic_sparsity(0.8, done=0.5) == pytest.approx(0.7)
    assert cubic_sparsity(0.8, done=1.0) == cubic_sparsity(0.8, done=2.0) == 0.8


def test_at_least_one_unit_stays():
    assert [kept_count(10, sparsity=s) for s in (0.0, 0.04, 0.25, 0.99)] == [10, 10, 8, 1]


def test_the_least_salient_go_and_do_not_come_back():
    salience = torch.tensor([[1.0, 5.0, 2.0, 2.0], [9.0, 0.0, 0.0, 3.0]])
    kept = torch.tensor([[True, True, True, True], [False, True, True, True]])
    assert keep_salient(salience, kept, count=2).tolist() == [[False, True, True, False], [False, True, False, True]]
    assert keep_salient(salience, kept, count=4).tolist() == kept.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_smaller_and_computes_the_same(one_rank, tmp_path, family):
    from transformers import AutoModelForCausalLM

    folder = _save(family, tmp_path / "backbone")
    targets = {"neurons": 0.3, "head_groups": 0.5, "layers": 0.34}
    (found,) = one_rank.run(jobs.export_pruned, folder=folder, into=str(tmp_path / "export"), targets=targets)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(loading.values()), loading
    assert len(found["kept"]) == model.config.num_hidden_layers == 2
    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (34, 1)
    with torch.no_grad():
        logits = model(**join_rows(make_rows(count=2, packed=True)).model_inputs, use_cache=False).logits
    torch.testing.assert_close(logits, found["logits"], rtol=1e-4, atol=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() < 0.75 * whole.num_parameters()
    with torch.no_grad():
        before = whole(**join_rows(make_rows(count=2, packed=True)).model_inputs, use_cache=False).logits
    assert (before - logits).abs().max() > 0.1, "pruning has changed the model"


def test_two_ranks_export_what_one_exports(one_rank, two_ranks, llama, tmp_path):
    from safetensors.torch import load_file

    targets = {"neurons": 0.5, "head_groups": 0.0, "layers": 0.0}
    tensors = []
    for pool, name in ((one_rank, "one"), (two_ranks, "two")):
        pool.run(jobs.export_pruned, folder=llama, into=str(tmp_path / name), targets=targets)
        tensors.append({k: v for file in (tmp_path / name).glob("*.safetensors") for k, v in load_file(file).items()})
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][name], tensor) for name, tensor in tensors[0].items())


def test_sparsity_follows_the_curve_and_pairs_follow_the_layers(two_ranks, llama):
    pruning = {"neurons": 0.5, "head_groups": 0.5, "layers": 0.34, "every_steps": 2, "begin_frac": 0.2, "end_frac": 0.9}
    teacher = {"adapters": {"pattern": jobs.PATTERN, "rank": 2, "max_rank": 3}, "pruning": pruning}
    first, second = two_ranks.run(jobs.pruning_course, folder=llama, steps=10, teacher=teacher)
    neurons = [figures["prune/neurons_frac"] for figures in first["course"]]
    expected, reached = [], 0.0
    for step in range(1, 11):
        done = min(max((step - 2) / 7, 0.0), 1.0)
        if step in (4, 6, 8, 9):
            reached = 1 - kept_count(48, sparsity=cubic_sparsity(0.5, done=done)) / 48
        expected.append(reached)
    assert neurons == pytest.approx(expected)
    assert neurons[-1] == 0.5 and first["course"][-1]["prune/head_groups_frac"] == 0.5
    kept = first["course"][-1]["kept"]
    assert len(kept) == 2
    for pairs, figures in zip(first["pairs"][1:], first["course"], strict=False):
        for pair in pairs:
            distance = min(abs(layer - pair.teacher) for layer in figures["kept"])
            assert pair.student in figures["kept"] and abs(pair.student - pair.teacher) == distance
    mean_rank = [figures["prune/mean_rank"] for figures in first["course"]]
    assert mean_rank[0] == 2.0 and mean_rank == sorted(mean_rank) and 2.4 < mean_rank[-1] <= 3.0
    assert all(torch.equal(second["state"][name], value) for name, value in first["state"].items())


@pytest.mark.parametrize(
    ("steps", "begin", "every", "skipped"),
    [(7, 0.2, 5, ()), (6, 0.0, 2, (2, 3)), (6, 0.0, 2, (6,)), (6, 0.0, 2, (2, 4, 6))],
    ids=["a quotient just below one", "skips on the way", "the last step", "all moments of an update"],
)
def test_the_targets_are_reached_at_the_last_step(one_rank, llama, steps, begin, every, skipped):
    shares = {"neurons": 0.5, "head_groups": 0.5, "layers": 0.34}
    pruning = shares | {"every_steps": every, "begin_frac": begin, "end_frac": 1.0}
    teacher = {"adapters": {"pattern": jobs.PATTERN, "rank": 2, "max_rank": 3}, "pruning": pruning}
    (found,) = one_rank.run(jobs.pruning_course, folder=llama, steps=steps, teacher=teacher, skipped=skipped)
    last = found["course"][-1]
    assert [last[f"prune/{kind}_frac"] for kind in shares] == pytest.approx([0.5, 0.5, 1 / 3])
    assert all(value.isfinite().all() for name, value in found["state"].items() if name.startswith("salience"))
    for step in skipped:
        if 1 < step < steps:
            assert found["course"][step - 1] == found["course"][step - 2], "nothing goes after a step that was skipped"


def test_a_target_that_a_skipped_step_missed_is_reached_at_the_next(one_rank, llama):
    pruning = {"neurons": 0.5, "every_steps": 10, "end_frac": 0.5}
    teacher = {"adapters": {"pattern": jobs.PATTERN, "rank": 2}, "pruning": pruning}
    (found,) = one_rank.run(jobs.pruning_course, folder=llama, steps=6, teacher=teacher, skipped=(3,))
    assert [figures["prune/neurons_frac"] for figures in found["course"]] == [0, 0, 0, 0.5, 0.5, 0.5]


def test_a_fresh_side_becomes_what_was_saved(two_ranks, llama, tmp_path):
    for before, after, figures in two_ranks.run(jobs.state_round_trip, folder=llama, into=str(tmp_path / "state")):
        assert before.keys() == after.keys() and {"ranks", "mask.neurons", "salience.ranks"} <= before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert figures["prune/mean_rank"] > 2 and figures["prune/neurons_frac"] > 0.2


def test_other_families_and_impossible_heads_are_refused():
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match=r"'gemma2' model are not known.*student\.model"):
        check_family(AutoConfig.for_model("gemma2"))
    sizes = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = AutoConfig.for_model("llama", **sizes)
    check_targets(config, neurons=0.5, head_groups=0.5, layers=0.5)
    with pytest.raises(ConfigError, match=r"teacher\.pruning\.head_groups.*6 heads"):
        check_targets(config, neurons=0.0, head_groups=0.25, layers=0.0)


def test_pairs_are_named_after_their_key_in_the_configuration(monkeypatch):
    keys = []

    def pairing(layers, *, key, **options):
        keys.append(key)
        return pair_layers(layers, key=key, **options)

    monkeypatch.setattr(self_shared, "pair_layers", pairing)
    objective = build_objective(ObjectiveConfig.model_validate(jobs.OBJECTIVE))
    pairs = self_shared.closest_pairs(objective, kept=(0, 2), depth=3)
    assert pairs == {"layers": ((0, 0), (2, 1), (2, 2))} and keys == ["objective.features.layers"]
