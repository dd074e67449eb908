"""The average of a student's weights: against float64, over ranks, placements, checkpoints and whole runs."""

import pytest
import torch
from ema_jobs import averaged_buffers, long_average, refusals, saved_and_loaded, train_with_average
from placements import offload
from tiny import save_tiny_llama

ONE_KEPT_WHOLE = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**6}}
ALL_IN_SHARDS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("models") / "student", seed=2, hidden=40, vocab=103))


def assert_close(mine, reference, *, tolerance):
    assert mine.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(mine[name].double(), value.double(), rtol=0, atol=tolerance)


def test_thousand_updates_of_a_bf16_student_equal_the_closed_form(student, two_ranks):
    for result in two_ranks.run(long_average, student=student, updates=1000, decay=0.9999):
        assert result["error"] < 1e-8
        # Averaging the bf16 weights instead would be seen.
        assert result["half"] > 1e-5
        assert result["cast"]


@pytest.mark.parametrize("teacher_zero", [ALL_IN_SHARDS, ONE_KEPT_WHOLE], ids=["teacher_shards", "teacher_whole"])
@pytest.mark.parametrize("student_zero", [ALL_IN_SHARDS, ONE_KEPT_WHOLE], ids=["student_shards", "student_whole"])
def test_teacher_is_the_average_whatever_is_kept_whole(student, two_ranks, teacher_zero, student_zero):
    arguments = {"steps": 3, "decay": 0.8, "teacher_zero": teacher_zero, "student_zero": student_zero}
    for result in two_ranks.run(train_with_average, student=student, **arguments):
        assert_close(result["teacher"], result["reference"], tolerance=1e-6)
        assert result["losses"][0] > 0 and len(set(result["losses"])) == 3


def test_two_ranks_average_as_one(student, one_rank, two_ranks):
    arguments = {"steps": 4, "decay": 0.99, "warmup": True}
    (alone,) = one_rank.run(train_with_average, student=student, **arguments)
    assert alone["decays"] == pytest.approx([1 / 10, 2 / 11, 3 / 12, 4 / 13])
    assert_close(alone["teacher"], alone["reference"], tolerance=1e-6)
    for result in two_ranks.run(train_with_average, student=student, **arguments):
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert_close(result["teacher"], alone["teacher"], tolerance=1e-5)


def test_offloaded_to_the_host_it_is_the_same(student, two_ranks, tmp_path):
    arguments = {"steps": 2, "decay": 0.8}
    here, _ = two_ranks.run(train_with_average, student=student, **arguments)
    away, _ = two_ranks.run(
        train_with_average,
        student=student,
        teacher_zero=offload("cpu", folder=tmp_path),
        student_zero=offload("cpu", folder=tmp_path, optimizer=True),
        **arguments,
    )
    assert away["losses"] == here["losses"]
    for name, value in here["teacher"].items():
        assert torch.equal(away["teacher"][name], value)


def test_forward_is_that_of_a_plain_model_with_the_averaged_weights(student, two_ranks):
    from tiny import join_rows, make_rows
    from transformers import AutoModelForCausalLM

    (result, _) = two_ranks.run(train_with_average, student=student, steps=2, decay=0.5, teacher_zero=ONE_KEPT_WHOLE)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.load_state_dict(result["teacher"], strict=False)
    batch = join_rows(make_rows(count=8, packed=False)[:2])
    with torch.no_grad():
        last = model.model(**batch.model_inputs, use_cache=False).last_hidden_state
    kept = batch.attention_mask_BS.bool()
    torch.testing.assert_close(result["last"][kept], last[kept], rtol=1e-4, atol=1e-5)


def test_frozen_parameters_are_averaged_too(student, two_ranks):
    optim = {"groups": [{"name": "still", "pattern": "embed_tokens", "lr_multiplier": 0.0}]}
    for result in two_ranks.run(train_with_average, student=student, steps=2, decay=0.8, optim=optim):
        assert_close(result["teacher"], result["reference"], tolerance=1e-6)


def test_state_comes_back_to_the_bit(student, two_ranks, tmp_path):
    for result in two_ranks.run(saved_and_loaded, student=student, folder=str(tmp_path)):
        assert result == {"moved": True, "same": True, "updates": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_00000.safetensors", "rank_00001.safetensors"]


def test_buffers_of_a_checkpoint_follow_too(one_rank):
    (buffers,) = one_rank.run(averaged_buffers)
    assert buffers == {"bias": [2.5] * 3, "seen": [11, 12], "angles": [1.0, 1.0]}


def test_a_file_that_does_not_fit_is_refused(student, two_ranks, tmp_path):
    for messages in two_ranks.run(refusals, student=student, folder=str(tmp_path)):
        tensor, updates, damaged = messages
        assert "other tensors than this student, such as 'model.layers.0.input_layernorm.weight'" in tensor
        assert "after how many updates" in updates
        assert "cannot be read" in damaged
