"""Whole runs with alignment terms: stopped and resumed, and exported without what belongs to training alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import distil, distil_until, metrics, settings

OBJECTIVE = {
    "alpha": 0.5,
    "features": [
        {"name": "hidden", "loss": "cosine", "layers": {"map": "adaptive", "rows": 4}, "projector": {"kind": "mlp"}},
        {"name": "drawn", "loss": "predictive", "sample_pairs": 1, "predictor_hidden": 12},
    ],
    "attention": [{"name": "maps", "layers": {"map": "last", "count": 2}, "head_importance": "learned"}],
}
CHANGES = {
    "objective": OBJECTIVE,
    "optim__groups": [{"name": "heads", "pattern": r"^alignment\.terms\..*", "lr_multiplier": 2.0}],
    "log__term_gradients": True,
    "eval__every_steps": 2,
}
TERMS = ("hidden", "drawn", "maps")
EXACT = (
    "loss",
    "tokens",
    "optim/grad_norm",
    "optim/lr/default",
    "optim/lr/heads",
    *(f"align/{name}" for name in TERMS),
    *(f"grad_norm/{name}" for name in (*TERMS, "cross_entropy", "forward_kl")),
)


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    """A run that is not stopped."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    two_ranks.run(distil, tree=settings(tiny_assets, run_dir, **CHANGES))
    return run_dir


def test_the_records_have_every_term_and_its_gradient(straight):
    records = metrics(straight)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert all(record[name] > 0 for name in EXACT)
        parts = [record[f"kd_weighted/{name}"] for name in ("cross_entropy", "forward_kl")]
        parts += [record[f"align_weighted/{name}"] for name in TERMS]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert record["optim/lr/heads"] == pytest.approx(2 * record["optim/lr/default"])
    assert records[-1]["align/hidden"] < records[0]["align/hidden"]


def test_a_stopped_run_resumes_bit_for_bit(straight, tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", **CHANGES)
    assert two_ranks.run(distil_until, tree=tree, step=4, rank=1) == [None, None]
    pairs = (tmp_path / "run/layer_pairs.json").read_bytes()
    two_ranks.run(distil, tree=tree)
    assert (tmp_path / "run/layer_pairs.json").read_bytes() == pairs == (straight / "layer_pairs.json").read_bytes()
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(straight), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "run", straight))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_export_is_the_student_alone(straight):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(straight / "export", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
    stored = load_file(straight / "export/model.safetensors")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert stored.keys() == model.state_dict().keys() - tied
    assert json.loads((straight / "export/config.json").read_text())["num_hidden_layers"] == 2


def test_a_layer_that_does_not_exist_is_one_message_on_every_rank(tiny_assets, two_ranks, tmp_path):
    objective = {"attention": [{"name": "maps", "layers": {"map": "explicit", "pairs": [[0, 0], [2, 1]]}}]}
    tree = settings(tiny_assets, tmp_path / "run", objective=objective)
    with pytest.raises(AssertionError, match=r"ConfigError: objective\.attention\.maps\.layers\.pairs\.1 = \[2, 1\]"):
        two_ranks.run(distil, tree=tree)
