"""Mistakes that only a started run can see: one readable message, before any expensive work, on every rank alike."""

import json
import shutil

import pytest
from tiny_run import distil, settings


def jsonl(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return {"path": str(path)}


def refused(pool, tree, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        pool.run(distil, tree=tree)


def test_missing_model_folder(tiny_assets, one_rank, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", teacher__model=str(tmp_path / "nowhere"))
    refused(one_rank, tree, r"ConfigError: teacher\.model = '.*nowhere': no such folder")


def test_vocabularies_that_differ(tiny_assets, one_rank, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(tiny_assets / "teacher", student)
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    tree = settings(tiny_assets, tmp_path / "run", student__model=str(student))
    refused(one_rank, tree, r"(Teacher|Data)Error: .*to the teacher and .*to the student.*student\.model")


def test_empty_data_set(tiny_assets, one_rank, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", data__train=jsonl(tmp_path / "empty.jsonl", []))
    refused(one_rank, tree, r"DataError: .*(data\.train.*empty\.jsonl|empty\.jsonl.*data\.train)")


def test_broken_json_line(tiny_assets, one_rank, tmp_path):
    records = [{"text": "one and one is two"}, '{"text": "two\n']
    tree = settings(tiny_assets, tmp_path / "run", data__train=jsonl(tmp_path / "broken.jsonl", records))
    refused(one_rank, tree, r"DataError: .*broken\.jsonl:2")


def test_conversation_without_an_answer(tiny_assets, one_rank, tmp_path):
    records = [{"messages": [{"role": "user", "content": "hello"}]}]
    tree = settings(tiny_assets, tmp_path / "run", data__train=jsonl(tmp_path / "chat.jsonl", records))
    refused(one_rank, tree, r"DataError: .*assistant")


def test_row_longer_than_the_positions(tiny_assets, one_rank, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__sequence_length=1024)
    refused(one_rank, tree, r"ConfigError: .*train\.sequence_length.*1024.*512")


def test_batch_that_does_not_divide(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__global_batch_size=6)
    refused(two_ranks, tree, r"ConfigError: train\.global_batch_size = 6.*2 ranks x .*micro_batch_size = 2")


def test_a_corrected_mistake_is_no_other_run(tiny_assets, one_rank, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=1, optim__warmup_steps=0, data__eval=None)
    tree["train"]["sequence_length"] = 1024
    refused(one_rank, tree, "sequence_length")
    tree["train"]["sequence_length"] = 32
    assert one_rank.run(distil, tree=tree)[0]["steps"] == 1


def test_placement_that_sets_an_owned_key(tiny_assets, one_rank, tmp_path):
    placement = tmp_path / "placement.json"
    placement.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}))
    tree = settings(tiny_assets, tmp_path / "run", student__deepspeed=str(placement))
    refused(one_rank, tree, r"ConfigError: .*placement\.json.*gradient_clipping.*train\.gradient_clipping")


def test_no_permission_to_write(tiny_assets, two_ranks, tmp_path):
    (tmp_path / "file").write_text("")
    tree = settings(tiny_assets, tmp_path / "file" / "run")
    refused(two_ranks, tree, r"ConfigError: run\.dir=.*cannot be created or written")


def test_pattern_that_matches_nothing(tiny_assets, one_rank, tmp_path):
    groups = [{"name": "experts", "pattern": r"experts\.\d+", "lr_multiplier": 2.0}]
    tree = settings(tiny_assets, tmp_path / "run", optim__groups=groups)
    refused(one_rank, tree, r"ConfigError: optim\.groups: the pattern .*experts.* claims no parameter")


def test_resume_with_another_number_of_ranks(tiny_assets, one_rank, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=3)
    two_ranks.run(distil, tree=tree)
    tree["train"]["max_steps"] = 4
    refused(one_rank, tree, r"CheckpointError: .*saved by 2 ranks and this job has 1")
