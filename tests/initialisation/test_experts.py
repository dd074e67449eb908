"""Experts out of MLPs, of experts, and MLPs of experts: the teacher's function is kept where it can be."""

from pathlib import Path

import pytest
import torch
from expert_jobs import initialised, measured
from families import build, family_config, save
from moe_models import mixture, save_moe, shape_like
from safetensors.torch import load_file
from tiny import make_rows, save_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from largekd.config.design import DesignConfig
from largekd.config.initialise import InitialiseConfig
from largekd.config.router import RouterDistillConfig
from largekd.distillation.initialise import check_initialise
from largekd.distillation.router import _check_map, _expert_maps
from largekd.errors import ConfigError
from largekd.initialisation.derive import derivations
from largekd.initialisation.fill import fill_from
from largekd.initialisation.report import Entry, InitialisationReport
from largekd.initialisation.sizes import sizes_of
from largekd.initialisation.width import plain_maps
from largekd.objectives.layer_maps import LayerPair
from largekd.planner.design import design_student

DENSE = {"llama": "mixtral", "qwen3": "qwen3_moe"}


def save_dense(folder: Path, family: str, *, seed: int = 5) -> Path:
    if family == "llama":
        return save_tiny_llama(folder, seed=seed)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=2, initializer_range=0.1,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def logits(config: Path, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Of a folder's model, or of its shape with these weights."""
    if weights is None:
        model = AutoModelForCausalLM.from_pretrained(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32)
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.no_grad():
        return model.eval()(torch.arange(3, 99).view(4, 24)).logits


@pytest.mark.parametrize("family", DENSE)
def test_copied_experts_keep_the_function(family, two_ranks, tmp_path):
    teacher = save_dense(tmp_path / "teacher", family)
    shape = mixture(experts=4, active=2, width=64)
    student = shape_like(teacher, tmp_path / "student", DENSE[family], **shape)
    for weights, report in two_ranks.run(initialised, teacher=str(teacher), student=str(student), initialise={}):
        torch.testing.assert_close(logits(student, weights), logits(teacher), rtol=0, atol=1e-5)
        router = weights["model.layers.0.mlp.gate.weight"]
        assert 0.01 < router.std() < 0.04
        assert len({entry["name"] for entry in report["tensors"]}) == len(report["tensors"]) == len(weights)


SPLITS = {
    # Slices of a half: two copies of the MLP; four experts are two whole copies.
    "whole copies are chosen": ({"experts": 8, "active": 4, "width": 32}, {"router_std": 0.5}, 1e-5),
    "all are active": ({"experts": 4, "active": 4, "width": 32}, {"router_std": 0.5}, 1e-5),
    "all are active and not scaled": ({"experts": 4, "active": 4, "width": 16, "norm_topk_prob": False}, {}, 1e-5),
    "copies that are not scaled": (
        {"experts": 4, "active": 2, "width": 64, "norm_topk_prob": False},
        {"from_dense": "copy", "router_std": 0.0},
        1e-5,
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_split_experts_keep_the_function(case, two_ranks, tmp_path):
    shape, experts, atol = SPLITS[case]
    teacher = save_dense(tmp_path / "teacher", "qwen3")
    student = shape_like(teacher, tmp_path / "student", "qwen3_moe", **mixture(**shape))
    initialise = {"experts": {"from_dense": "split", **experts}}
    (weights, _), _ = two_ranks.run(initialised, teacher=str(teacher), student=str(student), initialise=initialise)
    assert weights["model.layers.1.mlp.experts.down_proj"].shape == (shape["experts"], 32, shape["width"])
    torch.testing.assert_close(logits(student, weights), logits(teacher), rtol=0, atol=atol)


def test_a_part_of_the_slices_is_another_function(two_ranks, tmp_path):
    """What the other tests would not see if splitting kept all neurons in every expert."""
    teacher = save_dense(tmp_path / "teacher", "llama")
    student = shape_like(
        teacher, tmp_path / "student", "mixtral", **mixture(experts=4, active=2, width=0), intermediate_size=16
    )
    initialise = {"experts": {"from_dense": "split"}}
    (weights, _), _ = two_ranks.run(initialised, teacher=str(teacher), student=str(student), initialise=initialise)
    assert (logits(student, weights) - logits(teacher)).abs().max() > 0.01


def test_noise_parts_the_copies_by_as_much_as_asked_for(two_ranks, one_rank, tmp_path):
    teacher = save_dense(tmp_path / "teacher", "llama")
    student = shape_like(teacher, tmp_path / "student", "mixtral", **mixture(experts=4, active=2, width=64))
    call = {"teacher": str(teacher), "student": str(student), "initialise": {"experts": {"noise": 0.1}}}
    (weights, _), (others, _) = two_ranks.run(initialised, **call)
    up = load_file(teacher / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    ups = weights["model.layers.0.mlp.experts.gate_up_proj"][:, 64:]
    assert ((ups - up).std(dim=(1, 2)) / up.std()).tolist() == pytest.approx([0.1] * 4, rel=0.1)
    assert not torch.equal(ups[0], ups[1])
    ((alone, _),) = one_rank.run(initialised, **call)
    assert all(torch.equal(alone[name], others[name]) and torch.equal(alone[name], weights[name]) for name in alone)


def save_twins(folder: Path, family: str, *, groups: list[int], **shape) -> Path:
    """A mixture in which experts of one group are the same, with the same row of the router."""
    save_moe(folder, family, seed=2, experts=len(groups), **shape)
    model = AutoModelForCausalLM.from_pretrained(folder)
    first = [groups.index(group) for group in groups]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name or name.endswith("mlp.gate.weight"):
                parameter.copy_(parameter[first])
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fewer", ["merge", "most_used", (0, 2)])
def test_twins_become_one_expert(fewer, two_ranks, tmp_path):
    teacher = save_twins(tmp_path / "teacher", "mixtral", groups=[0, 0, 1, 1], active=4)
    student = shape_like(teacher, tmp_path / "student", "mixtral", **mixture(experts=2, active=2, width=0))
    results = two_ranks.run(
        initialised, teacher=str(teacher), student=str(student), initialise={"experts": {"fewer": fewer}}, watch=True
    )
    if fewer == "most_used":
        # Twins are used alike, so that the two most used ones are twins.
        assert (logits(student, results[0][0]) - logits(teacher)).abs().max() > 0.01
        return
    for weights, _ in results:
        torch.testing.assert_close(logits(student, weights), logits(teacher), rtol=0, atol=1e-5)


def test_twice_as_many_experts_are_twins(two_ranks, tmp_path):
    teacher = save_moe(tmp_path / "teacher", "qwen3_moe", seed=2, experts=2, active=1, norm_topk_prob=True)
    student = shape_like(teacher, tmp_path / "student", "qwen3_moe", **mixture(experts=4, active=2, width=48))
    (weights, _), _ = two_ranks.run(initialised, teacher=str(teacher), student=str(student), initialise={})
    torch.testing.assert_close(logits(student, weights), logits(teacher), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to_dense", ["average", "most_used", "concatenate"])
@pytest.mark.parametrize("family", DENSE)
def test_equal_experts_become_their_mlp(family, to_dense, two_ranks, tmp_path):
    teacher = save_twins(tmp_path / "teacher", DENSE[family], groups=[0, 0, 0, 0], active=2, norm_topk_prob=True)
    width = 48 * (3 if to_dense == "concatenate" else 1)
    student = shape_like(teacher, tmp_path / "student", family, intermediate_size=width)
    initialise = {"experts": {"to_dense": to_dense}}
    for weights, report in two_ranks.run(
        initialised, teacher=str(teacher), student=str(student), initialise=initialise, watch=True
    ):
        torch.testing.assert_close(logits(student, weights), logits(teacher), rtol=0, atol=1e-5)
        assert {entry["name"] for entry in report["tensors"]} == weights.keys()


def test_all_experts_side_by_side_are_weighted_by_their_load(one_rank, two_ranks, tmp_path):
    """The dense MLP is the sum of all experts' outputs, each with its mean weight."""
    teacher = save_moe(tmp_path / "teacher", "mixtral", seed=2, active=2)
    student = shape_like(teacher, tmp_path / "student", "llama", intermediate_size=4 * 48)
    initialise = {"experts": {"to_dense": "concatenate"}}
    call = {"teacher": str(teacher), "student": str(student), "initialise": initialise, "watch": True}
    (weights, _), _ = two_ranks.run(initialised, **call)
    (loads,) = one_rank.run(measured, folder=str(teacher))
    model = AutoModelForCausalLM.from_pretrained(teacher).model.layers[1].mlp
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    inner = [model.experts.gate_up_proj[expert] @ hidden.T for expert in range(4)]
    outputs = [
        model.experts.down_proj[expert] @ (torch.nn.functional.silu(part[:48]) * part[48:])
        for expert, part in enumerate(inner)
    ]
    expected = sum(float(loads[1].weight_X[expert]) * output for expert, output in enumerate(outputs))
    gate, up, down = (weights[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    found = down @ (torch.nn.functional.silu(gate @ hidden.T) * (up @ hidden.T))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert loads[1].weight_X.std() > 0.02


def test_experts_side_by_side_are_cut_to_any_width(one_rank, tmp_path):
    teacher = save_moe(tmp_path / "teacher", "mixtral", seed=2, active=2)
    config = {"experts": {"to_dense": "concatenate"}}
    found = {}
    for width in (4 * 48, 116):
        student = shape_like(teacher, tmp_path / f"student{width}", "llama", intermediate_size=width)
        call = {"teacher": str(teacher), "student": str(student), "initialise": config, "watch": True}
        [(found[width], _)] = one_rank.run(initialised, **call)
    (loads,) = one_rank.run(measured, folder=str(teacher))
    experts = AutoModelForCausalLM.from_pretrained(teacher).model.layers[1].mlp.experts
    order = loads[1].weight_X.argsort(descending=True).tolist()
    expected = torch.cat([experts.gate_up_proj[expert, :48] for expert in order])
    for width, weights in found.items():
        torch.testing.assert_close(weights["model.layers.1.mlp.gate_proj.weight"], expected[:width])
        assert weights["model.layers.1.mlp.down_proj.weight"].shape == (32, width)


def test_a_split_leaves_neurons_out_that_do_not_fill_a_slice(one_rank, tmp_path):
    teacher = save_dense(tmp_path / "teacher", "llama")
    student = shape_like(
        teacher, tmp_path / "student", "mixtral", **mixture(experts=4, active=2, width=0), intermediate_size=28
    )
    call = {
        "teacher": str(teacher),
        "student": str(student),
        "initialise": {"width": "truncate", "experts": {"from_dense": "split"}},
    }
    [(weights, _)] = one_rank.run(initialised, **call)
    gate = AutoModelForCausalLM.from_pretrained(teacher).model.layers[1].mlp.gate_proj.weight
    found = weights["model.layers.1.mlp.experts.gate_up_proj"][:, :28]
    for expert in range(4):
        torch.testing.assert_close(found[expert], gate[28 * (expert % 2) :][:28], rtol=0, atol=0)


MIXTURES = {
    "mixtral": {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("ratio", [None, 0.04, 0.06])
@pytest.mark.parametrize("family", MIXTURES)
def test_designed_dense_students_of_a_mixture_can_be_initialised(family, ratio):
    shape = {"num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}
    teacher = AutoConfig.for_model(family, **shape, **MIXTURES[family], head_dim=128)
    made = design_student(teacher.to_dict(), design=DesignConfig(experts=0, ratio=ratio, keep="depth")).config
    student, width = AutoConfig.for_model(**made), sizes_of(teacher).ffn
    side_by_side, averaged = (
        InitialiseConfig.model_validate({"experts": {"to_dense": rule}}) for rule in ("concatenate", "average")
    )
    if student.intermediate_size >= width:
        check_initialise(side_by_side, teacher=teacher, student=student)
    if student.intermediate_size <= width:
        check_initialise(averaged, teacher=teacher, student=student)
    else:
        with pytest.raises(ConfigError, match=r"(?s)'concatenate', which puts .*\(student\.design\.mlp_width"):
            check_initialise(averaged, teacher=teacher, student=student)


def test_ordinary_layers_among_experts_have_a_width_of_their_own(tmp_path):
    shape = {"mlp_only_layers": [0], "num_hidden_layers": 3, "norm_topk_prob": True}
    wide = family_config("qwen3_moe", **shape)
    narrow = family_config("qwen3_moe", **shape, moe_intermediate_size=8, intermediate_size=24)
    check_initialise(InitialiseConfig(), teacher=wide, student=narrow)
    teacher, student = build(wide, seed=1), build(narrow, seed=2)
    maps = plain_maps(teacher=sizes_of(wide), student=sizes_of(narrow), layers=range(3), even=False, gain=0.0)
    made = derivations(student, maps=maps, teacher_config=wide, seed=0)
    fill_from(student, derivations=made, folder=save(teacher, tmp_path), rank=0, seed=0)
    theirs, ours = teacher.model.layers, student.model.layers
    assert torch.equal(ours[0].mlp.down_proj.weight, theirs[0].mlp.down_proj.weight[:, :24])
    assert torch.equal(ours[1].mlp.experts.down_proj, theirs[1].mlp.experts.down_proj[:, :, :8])
    wider = family_config("qwen3_moe", **shape, moe_intermediate_size=8, intermediate_size=64)
    with pytest.raises(ConfigError, match="the MLP of the student's layer 0 has 64 neurons"):
        check_initialise(InitialiseConfig(), teacher=wide, student=wider)


def test_the_report_says_which_experts_correspond(one_rank, tmp_path):
    teacher = save_moe(tmp_path / "teacher", "mixtral", seed=2, active=2)
    (loads,) = one_rank.run(measured, folder=str(teacher))
    for rule, experts in (({"fewer": [3, 1]}, 2), ({"fewer": "most_used"}, 3), ({"fewer": "merge"}, 2), ({}, 8)):
        shape = mixture(experts=experts, active=2, width=0)
        student = shape_like(teacher, tmp_path / f"student{experts}", "mixtral", **shape)
        call = {"teacher": str(teacher), "student": str(student), "initialise": {"experts": rule}, "watch": True}
        [(weights, report)] = one_rank.run(initialised, **call)
        assert report["expert_map"].keys() == {"0", "1"}
        found = report["expert_map"]["1"]
        _check_map(found, student=experts, teacher=4, layer=1)
        down = AutoModelForCausalLM.from_pretrained(teacher).model.layers[1].mlp.experts.down_proj
        made = weights["model.layers.1.mlp.experts.down_proj"]
        if experts > 4:
            assert all(torch.equal(made[place], down[old]) for place, old in enumerate(found))
            continue
        for group in range(experts):
            members = [old for old, place in enumerate(found) if place == group]
            share = loads[1].weight_X[members]
            mixed = torch.einsum("m,mdj->dj", share / share.sum(), down[members])
            torch.testing.assert_close(made[group], mixed, rtol=1e-4, atol=1e-5)
        assert (-1 in found) == (rule["fewer"] != "merge")


def test_the_table_of_experts_is_a_file_that_routers_take(tmp_path):
    report = InitialisationReport(entries=(Entry("a", (2,), (), "drawn", 0.0),), expert_map={"0": [0, -1, 1]})
    report.write(tmp_path)
    distil = RouterDistillConfig(weight=1.0, expert_map=str(tmp_path / "expert_map.json"))
    assert _expert_maps(distil, layers=[LayerPair(0, 2)]) == {0: (0, -1, 1)}


def test_loads_are_those_of_real_positions_on_any_ranks(one_rank, two_ranks, tmp_path):
    teacher = save_moe(tmp_path / "teacher", "mixtral", seed=2, active=2)
    (alone,) = one_rank.run(measured, folder=str(teacher))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    weights, logits_of = torch.zeros(4), []

    def watch(_module, _inputs, output):
        nonlocal weights
        logit, weight, chosen = output
        used = batch.segments[0][0].length
        for position in range(used):
            for expert, share in zip(chosen[position].tolist(), weight[position].tolist(), strict=True):
                weights[expert] += share
        logits_of.append(logit[:used] - logit[:used].mean(dim=1, keepdim=True))

    model.model.layers[1].mlp.gate.register_forward_hook(watch)
    for batch in make_rows(count=8, packed=True, seed=4):
        with torch.no_grad():
            model(**batch.model_inputs, use_cache=False)
    rows = torch.cat(logits_of)
    assert len(rows) < 8 * 24
    torch.testing.assert_close(alone[1].weight_X, weights / len(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[1].similarity_XX, torch.corrcoef(rows.T), rtol=1e-3, atol=1e-3)
    for loads in two_ranks.run(measured, folder=str(teacher)):
        assert loads.keys() == alone.keys() == {0, 1}
        torch.testing.assert_close(loads[1].weight_X, alone[1].weight_X)


REFUSED = {
    "counts": ("mixtral", mixture(experts=6, active=2, width=0), {}, r"6 experts and the teacher 4: more experts must"),
    "active": ("mixtral", mixture(experts=4, active=5, width=0), {}, r"num_experts_per_tok = 5 is more than its 4"),
    "named": ("mixtral", mixture(experts=2, active=2, width=0), {"fewer": [1]}, r"names 1 experts, but .* has 2"),
    "absent": ("mixtral", mixture(experts=2, active=2, width=0), {"fewer": [1, 4]}, r"experts 0 to 3; 4 is not"),
    "twice": ("mixtral", mixture(experts=2, active=2, width=0), {"fewer": [1, 1]}, r"named twice"),
    "neurons": ("llama", {"intermediate_size": 40}, {"to_dense": "concatenate"}, r"1 to 4 times .* experts, 48"),
    "biases": ("llama", {"attention_bias": True}, {}, r"attention_bias is False in the teacher and True"),
    "family": ("qwen3_moe", mixture(experts=4, active=2, width=48), {}, r"cannot be made of a 'mixtral' teacher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_experts_that_do_not_map_are_refused(case, tmp_path):
    family, changes, experts, message = REFUSED[case]
    teacher = save_moe(tmp_path / "teacher", "mixtral", seed=2)
    student = shape_like(teacher, tmp_path / "student", family, **changes)
    config = InitialiseConfig.model_validate({"experts": experts})
    with pytest.raises(ConfigError, match=message):
        check_initialise(
            config, teacher=AutoConfig.from_pretrained(teacher), student=AutoConfig.from_pretrained(student)
        )


def test_slices_that_do_not_come_out_are_refused(tmp_path):
    teacher = save_dense(tmp_path / "teacher", "llama")
    config = InitialiseConfig.model_validate({"experts": {"from_dense": "split"}})
    for experts, width in ((4, 48), (3, 32)):
        student = shape_like(
            teacher, tmp_path / "student", "mixtral", **mixture(experts=experts, active=2, width=0),
            intermediate_size=width,
        )  # fmt: skip
        with pytest.raises(ConfigError, match=rf"64 neurons and {experts} experts of {width}"):
            check_initialise(
                config, teacher=AutoConfig.from_pretrained(teacher), student=AutoConfig.from_pretrained(student)
            )
