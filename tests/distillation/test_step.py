"""One optimizer step against plain transformers in float64, under every split of the work."""

import pytest
import torch
from step_jobs import gradient_of_step, reference_gradient, weights_after
from tiny import save_tiny_llama

ROWS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    teacher = save_tiny_llama(folder / "teacher", seed=1, layers=3, hidden=48)
    student = save_tiny_llama(folder / "student", seed=2)
    return {"teacher": str(teacher), "student": str(student)}


def assert_same_gradient(mine, reference, *, relative=1e-5):
    assert mine["count"] == pytest.approx(reference["count"])
    assert mine["loss"] == pytest.approx(reference["loss"], rel=relative)
    assert mine["gradients"].keys() == reference["gradients"].keys()
    norm = torch.stack([g.double().norm() for g in reference["gradients"].values()]).norm()
    for name, gradient in reference["gradients"].items():
        difference = (mine["gradients"][name].double() - gradient.double()).norm()
        assert difference <= relative * norm, f"{name}: {difference / norm:.2e}"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradient_is_the_same_under_every_split(models, one_rank, two_ranks, packed):
    reference = reference_gradient(rows=ROWS, packed=packed, **models)
    for pool, micro in ((one_rank, 1), (one_rank, 2), (two_ranks, 1), (two_ranks, 4)):
        for result in pool.run(gradient_of_step, rows=ROWS, packed=packed, micro_batch_size=micro, **models):
            assert_same_gradient(result, reference)


def test_gradient_with_checkpointing_and_head_gathered_per_micro_batch(models, two_ranks):
    reference = reference_gradient(rows=ROWS, packed=True, **models)
    for options in ({"checkpointing": True}, {"gather_head_once": False}):
        for result in two_ranks.run(gradient_of_step, rows=ROWS, packed=True, micro_batch_size=2, **models, **options):
            assert_same_gradient(result, reference)


def test_untied_head_and_a_wrong_reference_is_seen(models, two_ranks, tmp_path):
    student = str(save_tiny_llama(tmp_path / "untied", seed=3, tied=False))
    reference = reference_gradient(rows=ROWS, packed=False, teacher=models["teacher"], student=student)
    (result, _) = two_ranks.run(
        gradient_of_step, rows=ROWS, packed=False, micro_batch_size=2, teacher=models["teacher"], student=student
    )
    assert_same_gradient(result, reference)
    reference["gradients"]["lm_head.weight"] *= 1.001
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        assert_same_gradient(result, reference)


def test_rank_without_a_counted_token(models, two_ranks):
    # Rows 0 and 4 of the eight have no counted token: with two rows, rank 0 has nothing to learn from.
    reference = reference_gradient(rows=2, packed=False, **models)
    for result in two_ranks.run(gradient_of_step, rows=2, packed=False, micro_batch_size=1, **models):
        assert_same_gradient(result, reference)


def test_step_without_any_counted_token_moves_nothing(models, two_ranks):
    arguments = {"rows": 2, "packed": False, "micro_batch_size": 1, "every": 4}
    for result in two_ranks.run(gradient_of_step, **arguments, **models):
        assert result["count"] == 0
        assert all((gradient == 0).all() for gradient in result["gradients"].values())


def test_accumulation_updates_at_every_step(models, two_ranks):
    for result in two_ranks.run(weights_after, steps=3, rows=8, packed=True, micro_batch_size=2, **models):
        assert all(step > 1e-3 for step in result["moved"]), result["moved"]


def test_two_ranks_train_as_one(models, one_rank, two_ranks):
    arguments = {"steps": 3, "rows": 8, "packed": True, "micro_batch_size": 2, "lr": 1e-3, "clipping": 0.5}
    (alone,) = one_rank.run(weights_after, **arguments, **models)
    for result in two_ranks.run(weights_after, **arguments, **models):
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-5, atol=1e-5)


def test_teacher_equal_to_student_has_no_divergence(models, two_ranks):
    for result in two_ranks.run(
        weights_after,
        steps=1,
        rows=8,
        packed=True,
        micro_batch_size=2,
        teacher=models["student"],
        student=models["student"],
        objective={"alpha": 1.0, "divergences": [{"name": "forward_kl"}, {"name": "reverse_kl"}, {"name": "jsd"}]},
    ):
        assert abs(result["losses"][0]) < 1e-6
