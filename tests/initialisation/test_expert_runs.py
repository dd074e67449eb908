"""Whole runs whose students have other experts than their teachers; each export is the next run's teacher."""

import json
import shutil

import pytest
import torch
from initialisation_jobs import write_student_folder
from moe_models import mixture, save_moe, shape_like
from safetensors.torch import load_file
from tiny_run import cache, distil, from_cache, settings
from transformers import AutoModelForCausalLM


@pytest.fixture
def made(tiny_assets, tmp_path, two_ranks):
    """Runs two steps with a student of another kind; its folder, and the perplexities of both models before them."""

    def run(name, *, teacher, family, experts, **shape):
        student = shape_like(teacher, tmp_path / f"{name}-shape", family, **shape)
        tree = settings(
            tiny_assets, tmp_path / name, train__max_steps=2, optim__warmup_steps=0, teacher__model=str(teacher),
            student__initialise={"layers": "first", "experts": experts}, student__config=str(student),
        )  # fmt: skip
        del tree["student"]["teacher_layers"]
        summary, _ = two_ranks.run(distil, tree=tree)
        report = json.loads((tmp_path / name / "initialisation.json").read_text())
        return tmp_path / name, summary, report

    return run


def test_dense_to_experts_to_fewer_experts_to_dense(made, tiny_assets):
    width = json.loads((tiny_assets / "teacher/config.json").read_text())["intermediate_size"]
    teacher = tiny_assets / "teacher"
    shape = mixture(experts=4, active=2, width=0)
    first, summary, report = made("first", teacher=teacher, family="mixtral", experts={"noise": 0.05}, **shape)
    assert summary["steps"] == 2
    # Nearly the teacher's function, so nearly nothing to learn.
    assert summary["eval"]["before"]["kl"] < 0.02
    names = load_file(first / "export/model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    model, loading = AutoModelForCausalLM.from_pretrained(first / "export", output_loading_info=True)
    assert not any(loading.values())
    assert {name for name, _ in model.named_parameters()} == {entry["name"] for entry in report["tensors"]}

    fewer = mixture(experts=2, active=1, width=0)
    _, summary, report = made("second", teacher=first / "export", family="mixtral", experts={}, **fewer)
    assert summary["eval"]["before"]["kl"] < 0.05
    assert any("experts merged" in entry["how"] for entry in report["tensors"])

    _, summary, report = made(
        "third", teacher=first / "export", family="llama", experts={"to_dense": "average"}, intermediate_size=width
    )
    assert summary["eval"]["before"]["kl"] < 0.05
    assert not any(entry["how"] == "drawn" for entry in report["tensors"])
    assert torch.isfinite(torch.tensor(summary["eval"]["after"]["perplexity"]))


def test_a_cached_teacher_and_the_launcher_watch_the_routers_too(tiny_assets, tmp_path, two_ranks, one_rank):
    like, teacher = tiny_assets / "teacher", tmp_path / "teacher"
    sizes = json.loads((like / "config.json").read_text())
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    save_moe(teacher, "mixtral", seed=2, **{name: sizes[name] for name in kept}, max_position_embeddings=512)
    shutil.copytree(like, teacher, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shape = shape_like(teacher, tmp_path / "shape", "mixtral", **mixture(experts=2, active=2, width=0))
    online = settings(
        tiny_assets, tmp_path / "online", train__max_steps=1, optim__warmup_steps=0, teacher__model=str(teacher),
        student__initialise={"layers": "first"}, student__config=str(shape),
    )  # fmt: skip
    del online["student"]["teacher_layers"]
    online["cache"] = {"path": str(tmp_path / "cache"), "codec": {"kind": "top_k", "k": 16}}
    online["objective"]["signal"] = {"kind": "top_k", "k": 16}
    two_ranks.run(cache, tree=online)
    cached = from_cache(online, run__dir=str(tmp_path / "cached"))
    del cached["cache"]
    one_rank.run(write_student_folder, tree=online, output=str(tmp_path / "written"))
    written = {**online, "student": {"model": str(tmp_path / "written"), "deepspeed": online["student"]["deepspeed"]}}
    written["run"] = {**online["run"], "dir": str(tmp_path / "from_written")}
    first, *others = (
        two_ranks.run(distil, tree=tree)[0]["eval"]["before"]["perplexity"] for tree in (online, cached, written)
    )
    assert others == pytest.approx([first, first], rel=1e-5)
    report = json.loads((tmp_path / "cached/initialisation.json").read_text())
    assert any("experts merged" in entry["how"] for entry in report["tensors"])
