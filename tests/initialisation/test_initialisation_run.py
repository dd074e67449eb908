"""Runs, and the launcher's work, with a student that is made of the teacher."""

import json
from pathlib import Path

import pytest
import torch
from initialisation_jobs import filled_weights, write_student_folder
from placements import needs_libaio, offload
from pool import RankError
from safetensors.torch import load_file
from tiny_run import distil, distil_until, metrics, settings

NARROW = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
PLAIN = {"layers": "uniform", "width": "truncate"}


@pytest.fixture
def tree(tiny_assets, tmp_path):
    """A run whose student has another shape than the tiny teacher."""

    def make(name="run", *, shape=NARROW, **changes):
        config = json.loads((tiny_assets / "teacher/config.json").read_text())
        path = tmp_path / name / "student.json"
        path.parent.mkdir()
        path.write_text(json.dumps(config | shape))
        made = settings(tiny_assets, tmp_path / name / "run", **{"student__initialise": PLAIN, **changes})
        del made["student"]["teacher_layers"]
        made["student"]["config"] = str(path)
        return made

    return make


def test_two_ranks_give_what_one_gives_and_the_report_names_every_tensor(two_ranks, one_rank, tree):
    student = tree()["student"]["config"]
    teacher = tree("other")["teacher"]["model"]
    for even in (False, True):
        job = {"teacher": teacher, "student": student, "even": even, "drawn": ("gate_proj.weight",)}
        (alone,) = one_rank.run(filled_weights, **job)
        for result in two_ranks.run(filled_weights, **job):
            assert result["report"] == alone["report"]
            for name, value in alone["weights"].items():
                assert torch.equal(result["weights"][name], value), name
        tensors = alone["report"]["tensors"]
        assert [entry["name"] for entry in tensors] == list(alone["weights"])
        drawn = [entry["name"] for entry in tensors if entry["how"] == "drawn"]
        assert drawn == [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)]
        first, second = (alone["weights"][name] for name in drawn)
        assert first.std() > 0.01 and not torch.equal(first, second)
        stored = load_file(f"{teacher}/model.safetensors")
        for entry in tensors:
            assert entry["shape"] == alone["weights"][entry["name"]].shape
            assert all(source in stored for source in entry["sources"])


@needs_libaio
def test_a_student_on_nvme_is_filled_alike(two_ranks, tree, tmp_path):
    job = {"teacher": tree()["teacher"]["model"], "student": tree("other")["student"]["config"]}
    plain = two_ranks.run(filled_weights, **job)[0]["weights"]
    for name, value in two_ranks.run(filled_weights, **job, zero=offload("nvme", folder=tmp_path))[0][
        "weights"
    ].items():
        assert torch.equal(value, plain[name]), name


def test_a_student_of_the_teacher_s_shape_starts_as_the_teacher_and_a_deeper_cut_does_not(two_ranks, tree):
    whole = two_ranks.run(distil, tree=tree(shape={}, train__max_steps=1, optim__warmup_steps=0))[0]
    assert whole["eval"]["before"]["kl"] == pytest.approx(0, abs=1e-6)
    cut = two_ranks.run(distil, tree=tree("cut", train__max_steps=1, optim__warmup_steps=0))[0]
    assert cut["eval"]["before"]["kl"] > 0.1


def test_a_run_leaves_the_report_and_resumes_bit_for_bit(two_ranks, tree):
    straight, stopped = tree("straight"), tree("stopped")
    two_ranks.run(distil, tree=straight)
    report = json.loads(Path(straight["run"]["dir"], "initialisation.json").read_text())
    assert report["plan"]["layers"] == [0, 3] and report["plan"]["width"] == "truncate"
    two_ranks.run(distil_until, tree=stopped, step=4, rank=0)
    two_ranks.run(distil, tree=stopped)
    ours, theirs = (metrics(Path(side["run"]["dir"])) for side in (straight, stopped))
    assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]


def test_the_launcher_writes_a_plain_folder_that_a_run_starts_from(two_ranks, tree, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, output = tree(train__max_steps=1, optim__warmup_steps=0), tmp_path / "student"
    two_ranks.run(write_student_folder, tree=made, output=str(output))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.hidden_size == 32 and model.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(output)) > 256
    report = json.loads((output / "initialisation.json").read_text())
    assert [entry["name"] for entry in report["tensors"]] == [name for name, _ in model.named_parameters()]
    direct = two_ranks.run(distil, tree=made)[0]
    loaded = tree("loaded", train__max_steps=1, optim__warmup_steps=0)
    loaded["student"] = {"model": str(output), "deepspeed": made["student"]["deepspeed"]}
    through = two_ranks.run(distil, tree=loaded)[0]
    assert through["eval"]["before"] == direct["eval"]["before"]


@pytest.mark.parametrize("inside", ["notes.txt", "initialisation.json", "config.json"])
def test_the_launcher_replaces_nothing_but_an_earlier_student(one_rank, tree, tmp_path, inside):
    output = tmp_path / "mine"
    output.mkdir()
    (output / inside).write_text("precious")
    with pytest.raises(RankError, match="is no student that was made here"):
        one_rank.run(write_student_folder, tree=tree(), output=str(output))
    assert (output / inside).read_text() == "precious"


def test_the_launcher_does_not_write_over_a_model_it_reads(one_rank, tree, tmp_path):
    first = tmp_path / "first"
    made = tree()
    one_rank.run(write_student_folder, tree=made, output=str(first))
    # An earlier student may be replaced, but not while it is the teacher.
    one_rank.run(write_student_folder, tree=made, output=str(first))
    again = tree("again", teacher__model=str(first))
    again["student"]["config"] = str(first / "config.json")
    before = (first / "config.json").read_bytes()
    with pytest.raises(RankError, match="would be deleted"):
        one_rank.run(write_student_folder, tree=again, output=str(first))
    assert (first / "config.json").read_bytes() == before and (first / "model.safetensors").is_file()


def test_an_output_where_nothing_can_be_written_is_refused_before_work(one_rank, tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RankError, match=r"nothing can be written in .*file"):
        one_rank.run(write_student_folder, tree=tree(), output=str(tmp_path / "file" / "student"))


def test_whole_layers_are_written_too_and_the_report_names_them(one_rank, tiny_assets, tmp_path):
    made = settings(tiny_assets, tmp_path / "run", student__teacher_layers=[1, 2])
    one_rank.run(write_student_folder, tree=made, output=str(tmp_path / "student"))
    teacher = load_file(tiny_assets / "teacher/model.safetensors")
    student = load_file(tmp_path / "student/model.safetensors")
    kept = [name for name in student if ".layers." in name]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in kept} == {0, 1}
    for name in kept:
        old = name.replace(".layers.1.", ".layers.2.").replace(".layers.0.", ".layers.1.")
        assert torch.equal(student[name], teacher[old].to(student[name].dtype)), name
    report = json.loads((tmp_path / "student/initialisation.json").read_text())
    assert report["plan"]["teacher_layers"] == [1, 2] and report["tensors"] == []
