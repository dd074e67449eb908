"""The tool that designs students: what it prints, writes and refuses."""

import argparse
import json
import shutil

import design_student
import pytest
from transformers import AutoConfig

from largekd.config.load import parse_config
from largekd.errors import ConfigError
from largekd.planner.plan import plan
from largekd.planner.shapes import read_shape

TEACHER = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 500,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TEACHER))
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt"):
        (folder / name).write_text(name)
    (folder / "model.safetensors").write_text("weights")
    return folder


def test_a_student_is_written_and_is_what_a_recipe_takes(teacher, tmp_path, capsys):
    out = tmp_path / "student"
    assert design_student.main([str(teacher), "--ratio", "1/4", "--keep", "depth", "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "achieved" in shown and "training, bf16, ranks 1" in shown and f"student.config = {out}" in shown
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "tokenizer.json",
    ]
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 12
    shape = read_shape(json.loads((out / "config.json").read_text()))
    assert shape.parameter_count / read_shape(TEACHER).parameter_count == pytest.approx(0.25, rel=0.05)


def test_the_tool_and_the_recipe_key_agree(teacher, tmp_path):
    out = tmp_path / "student"
    assert design_student.main([str(teacher), "--memory", "20MB", "--storage", "int8", "--output", str(out)]) == 0
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"model": str(teacher), "deepspeed": "ds_configs/teacher_zero3.json"},
        "student": {
            "design": {"memory_bytes": 20_000_000, "storage": "int8"},
            "deepspeed": "ds_configs/zero3.json",
        },
        "data": {"train": "unread.jsonl"},
        "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 64},
        "checkpoint": {"every_steps": 0},
    }
    planned = plan(parse_config(tree), world_size=1)
    assert planned.student == read_shape(json.loads((out / "config.json").read_text()))
    tree["student"]["model"] = str(teacher)
    with pytest.raises(ConfigError, match=r"student\.model: student\.design already says"):
        parse_config(tree)
    tree["train"]["sequence_length"] = 4096
    del tree["student"]["model"]
    with pytest.raises(ConfigError, match=r"teacher\.model has 2048 positions"):
        plan(parse_config(tree), world_size=1)


def test_rules_side_by_side(teacher, capsys):
    assert design_student.main([str(teacher), "--ratio", "0.5", "--compare"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == ["teacher", "depth", "width", "balanced"]
    layers = next(row.split()[1:] for row in rows if row.startswith("layers"))
    assert layers[:2] == ["12", "12"] and int(layers[2]) < int(layers[3]) < 12


def test_a_mixture_is_written(teacher, tmp_path):
    out = tmp_path / "mixture"
    assert design_student.main([str(teacher), "--experts", "4", "--active-experts", "2", "--output", str(out)]) == 0
    assert AutoConfig.from_pretrained(out).model_type == "qwen3_moe"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ratio", "1/1000"], "--ratio: "),
        (["--parameters", "1B"], "--parameters: 1,000,000,000 parameters are more than the largest"),
        (["--memory", "1GB"], "--memory: the budget of 1,000,000,000 bytes holds the whole model"),
        (["--experts", "2", "--active-experts", "3"], "--active-experts = 3: must be at most"),
        ([], "--ratio: no target is given"),
        (["--ratio", "0.5", "--layers", "0"], "layers = 0"),
        (["--ratio", "0.5", "--sequence-length", "9999"], "9999"),
    ],
)
def test_refusals(teacher, capsys, options, expected):
    assert design_student.main([str(teacher), *options]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("design_student.py: ") and expected in shown


def test_a_teacher_that_is_not_here(tmp_path, capsys):
    assert design_student.main([str(tmp_path / "nothing"), "--ratio", "0.5"]) == 2
    assert "not a folder with a config.json" in capsys.readouterr().err


def test_no_model_is_overwritten(teacher, tmp_path, capsys):
    assert design_student.main([str(teacher), "--ratio", "0.5", "--output", str(teacher)]) == 2
    assert "the teacher is there" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_text("weights")
    assert design_student.main([str(teacher), "--ratio", "0.5", "--output", str(other)]) == 2
    assert json.loads((teacher / "config.json").read_text()) == TEACHER


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (design_student.ratio, "1/8", 0.125),
        (design_student.ratio, "12.5%", 0.125),
        (design_student.count, "1.5B", 1_500_000_000),
        (design_student.count, "350m", 350_000_000),
        (design_student.size, "2GB", 2_000_000_000),
        (design_student.size, "600MB", 600_000_000),
        (design_student.size, "1000", 1000),
    ],
)
def test_sizes_as_people_write_them(read, text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (design_student.ratio, "1/0"),
        (design_student.ratio, "-1"),
        (design_student.ratio, "nan"),
        (design_student.count, "many"),
        (design_student.size, "0GB"),
        (design_student.size, "infB"),
    ],
)
def test_sizes_that_are_none(read, text):
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


def test_the_tokenizer_of_a_hub_model_is_that_of_its_folder(teacher, tmp_path, monkeypatch):
    # A stray file of the folder in which the command is given is nobody's.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("stray")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("tiny", "maker/tiny"):
        snapshots = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (snapshots / "refs").mkdir(parents=True)
        (snapshots / "refs/main").write_text("abc")
        shutil.copytree(teacher, snapshots / "snapshots/abc")
        out = tmp_path / "made" / name
        assert design_student.main([name, "--ratio", "0.5", "--output", str(out)]) == 0
        copied = {"config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"}
        assert {path.name for path in out.iterdir()} == copied
