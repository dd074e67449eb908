"""Where a remote teacher's texts and token may go."""

import pytest

from largekd.config.load import parse_config
from largekd.errors import ConfigError


def tree(**teacher: object) -> dict[str, object]:
    return {
        "run": {"dir": "runs/x"},
        "teacher": {"kind": "remote", "model": "t", "servers": ["http://127.0.0.1:8400"]} | teacher,
        "student": {"model": "s", "deepspeed": "b.json"},
        "data": {"train": "train.jsonl"},
        "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 16},
    }


@pytest.mark.parametrize(
    "teacher",
    [
        {},
        {"servers": ["http://localhost:1", "https://[::1]:2"]},
        {"servers": ["https://teacher.example"], "allow_remote": True},
        {"protocol": "vllm", "served_model": "m"},
    ],
)
def test_good_addresses(teacher: dict[str, object]) -> None:
    assert parse_config(tree(**teacher)).teacher.kind == "remote"


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"servers": ["https://teacher.example"]}, r"teacher\.servers\.0.*allow_remote"),
        ({"servers": ["http://teacher.example"], "allow_remote": True}, "must be https"),
        ({"servers": ["http://127.0.0.1.teacher.example"], "allow_remote": True}, "must be https"),
        ({"servers": ["http://127.0.0.1:1", "ftp://127.0.0.1"]}, r"teacher\.servers\.1"),
        ({"servers": ["127.0.0.1:8400"]}, "must look like"),
        ({"servers": ["http://user:secret@127.0.0.1"]}, "must not hold a password"),
        ({"servers": ["http://127.0.0.1:99999"]}, "no address"),
        ({"servers": []}, "servers"),
        ({"protocol": "vllm"}, "served_model"),
    ],
)
def test_bad_addresses(teacher: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_config(tree(**teacher))
    assert "secret" not in str(caught.value)
