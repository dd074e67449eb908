"""Finding both models: what is fetched of a teacher, and the key that messages name."""

import json
import shutil
from contextlib import nullcontext
from fnmatch import fnmatch

import pytest
from teachers.test_cache_format import make_cache
from tiny_run import settings

from largekd.config.load import parse_config
from largekd.distillation.models import find_sources
from largekd.errors import ConfigError, TeacherError

REMOTE = {"kind": "remote", "model": "owner/model", "servers": ["http://127.0.0.1:1"]}


@pytest.mark.parametrize("own", [True, False])
def test_weights_of_a_remote_teacher_are_fetched_only_for_a_student_of_its_layers(
    tiny_assets, tmp_path, monkeypatch, own
):
    asked = []

    def fetch(name, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return tiny_assets / "teacher"

    monkeypatch.setattr("largekd.models.source.snapshot_download", fetch)
    tree = settings(tiny_assets, tmp_path, teacher=REMOTE)
    if own:
        del tree["student"]["teacher_layers"]
        tree["student"]["config"] = str(tiny_assets / "teacher")
    assert find_sources(parse_config(tree), first=nullcontext).teacher.path == tiny_assets / "teacher"
    assert any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in asked) != own
    assert all(any(fnmatch(name, pattern) for pattern in asked) for name in ("config.json", "tokenizer.json"))


def test_messages_about_a_cached_teacher_name_the_cache(tiny_assets, tmp_path):
    make_cache(tmp_path / "cache")
    student = tmp_path / "student"
    for folder in (tmp_path / "cache/teacher", student):
        shutil.copytree(tiny_assets / "teacher", folder)
    tree = settings(
        tiny_assets,
        tmp_path,
        teacher={"kind": "cached", "path": str(tmp_path / "cache")},
        student={"model": str(student), "deepspeed": "ds_configs/zero3.json"},
        objective={"alpha": 1.0, "signal": {"kind": "top_k", "k": 4}},
    )
    assert find_sources(parse_config(tree), first=nullcontext).teacher.path == tmp_path / "cache/teacher"
    tree["train"]["sequence_length"] = 1024
    with pytest.raises(ConfigError, match=r"the model of teacher\.path has 512 .* choose another teacher\.path"):
        find_sources(parse_config(tree), first=nullcontext)
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TeacherError, match=r"tokenizers of teacher\.path and student\.model differ"):
        find_sources(parse_config(tree), first=nullcontext)
