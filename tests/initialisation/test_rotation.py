"""Rotating the residual stream keeps a model's function; cutting it does where nothing was in what is cut."""

from pathlib import Path

import pytest
import torch
from calibration_jobs import moment_of_rank, rotated_by_own_moment, student_weights
from initialisation.test_importance import SHAPE, logits, smaller
from pool import RankPool
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.errors import ConfigError
from largekd.initialisation.rotation import ROTATABLE, check_positions, check_rotatable, principal_directions


def random_teacher(folder: Path, *, model_type: str, tied: bool, directions_DK: Tensor | None = None) -> Path:
    """A random teacher with uneven norms; all that it writes to its stream is within the span of `directions_DK`."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **SHAPE, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                value.normal_(std=0.1)
        if directions_DK is not None:
            onto_DD = directions_DK @ directions_DK.T
            embedding = model.get_input_embeddings().weight
            embedding.copy_(embedding @ onto_DD)
            for layer in model.model.layers:
                for end in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    end.weight.copy_(onto_DD @ end.weight)
                    if end.bias is not None:
                        end.bias.copy_(onto_DD @ end.bias)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", sorted(ROTATABLE))
def test_a_rotation_alone_changes_nothing(one_rank: RankPool, tmp_path: Path, model_type: str) -> None:
    source = random_teacher(tmp_path / "teacher", model_type=model_type, tied=model_type != "phi3")
    target = smaller(tmp_path / "student", source=source, tie_word_embeddings=False)
    job = {"teacher": str(source), "config": str(target), "rule": "pca", "layers": [0, 1, 2]}
    [(weights, report)] = one_rank.run(student_weights, **job)
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert not torch.allclose(weights["model.embed_tokens.weight"], original["model.embed_tokens.weight"], atol=1e-2)
    torch.testing.assert_close(logits(target, weights=weights), logits(source), rtol=1e-4, atol=1e-4)
    assert sorted(entry["name"] for entry in report["tensors"]) == sorted(weights)


@pytest.mark.parametrize("tied", [True, False])
def test_a_stream_in_a_subspace_is_kept(one_rank: RankPool, two_ranks: RankPool, tmp_path: Path, tied: bool) -> None:
    directions = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(2))).Q
    source = random_teacher(tmp_path / "teacher", model_type="llama", tied=tied, directions_DK=directions)
    target = smaller(
        tmp_path / "student", source=source, hidden_size=16, tie_word_embeddings=False, rms_norm_eps=1e-5 * 32 / 16
    )
    job = {"teacher": str(source), "config": str(target), "rule": "pca", "layers": [0, 1, 2]}
    [(weights, _)] = one_rank.run(student_weights, **job)
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (32, 16)
    torch.testing.assert_close(logits(target, weights=weights), logits(source), rtol=1e-4, atol=1e-4)
    for other, _ in two_ranks.run(student_weights, **job):
        torch.testing.assert_close(logits(target, weights=other), logits(source), rtol=1e-4, atol=1e-4)


def test_directions_are_orthonormal_and_take_the_greatest_moments() -> None:
    torch.manual_seed(4)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    values = torch.tensor([5.0, 0.1, 3.0, 0.5, 0.2, 1.0], dtype=torch.float64)
    directions, energy = principal_directions(basis @ values.diag() @ basis.T, width=3)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3, dtype=torch.float64))
    assert energy == pytest.approx(9.0)
    for place, column in enumerate((0, 2, 5)):
        assert float((directions[:, place] @ basis[:, column]).abs()) == pytest.approx(1.0)


def test_every_rank_has_the_directions_of_the_first(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(rotated_by_own_moment, width=3)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    alone, energy = principal_directions(moment_of_rank(0), width=3)
    torch.testing.assert_close(first[0], alone.T.float())
    assert first[1] == pytest.approx((energy / 3) ** 0.5)


def test_less_text_than_directions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"7 positions were measured.*raise student\.initialise\.calibration_rows"):
        check_positions(7.0, width=8)
    check_positions(8.0, width=8)


def test_families_that_cannot_be_rotated_and_tied_students_are_refused() -> None:
    with pytest.raises(ConfigError, match="'gemma2' model has more than weighted RMSNorms"):
        check_rotatable(AutoConfig.for_model("gemma2"))
    with pytest.raises(ConfigError, match=r"tie_word_embeddings to false in student\.config"):
        check_rotatable(AutoConfig.for_model("llama", tie_word_embeddings=True))
    check_rotatable(AutoConfig.for_model("llama", tie_word_embeddings=False))
