"""A model folder with a trimmed vocabulary says of kept tokens what the whole model says, and learns from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from initialisation.families import build, family_config
from make_tiny_model import Shape, make_model
from pool import RankPool
from safetensors.torch import save_file
from tiny_run import distil, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trim_vocabulary import REPORT, main, trim_model

from largekd.data.vocabulary import check_same_tokenizer
from largekd.errors import ConfigError, TeacherError
from largekd.initialisation.vocabulary import trim_weights


@pytest.mark.parametrize(("tied", "shard_size"), [(True, "50GB"), (False, "100KB")])
def test_logits_of_kept_tokens_stay(tiny_assets: Path, tmp_path: Path, tied: bool, shard_size: str) -> None:
    source, output = tmp_path / "source", tmp_path / "trimmed"
    make_model(source, shape=Shape(tied=tied), seed=0)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size=shard_size)
    if not tied:
        (source / "model.safetensors").unlink()
    report = trim_model(str(source), corpora=[str(tiny_assets / "eval.jsonl")], output=output, keep=320)
    assert report["tokens"] == 320
    kept = json.loads((output / REPORT).read_text())["source_ids"]
    whole, trimmed = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, output))
    assert trimmed.config.vocab_size == len(kept) == 320
    assert trimmed.num_parameters() == whole.num_parameters() - (384 - 320) * 64 * (1 if tied else 2)
    ids = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(torch.tensor(kept)[ids]).logits[..., kept]
        torch.testing.assert_close(trimmed(ids).logits, expected, rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert trimmed.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(output).eos_token_id == tokenizer.eos_token_id


def test_a_head_that_is_stored_under_another_name_is_trimmed_too(tmp_path: Path) -> None:
    config = family_config("gpt_neox", tie_word_embeddings=False)
    model = build(config, seed=1)
    source, target = tmp_path / "source", tmp_path / "trimmed"
    model.save_pretrained(source)
    target.mkdir()
    cut = trim_weights(source, target=target, config=config, kept_V=np.arange(0, 67, 2))
    assert cut == {"gpt_neox.embed_in.weight": [34, 32], "embed_out.weight": [34, 32]}
    family_config("gpt_neox", tie_word_embeddings=False, vocab_size=34).save_pretrained(target)
    trimmed, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    ids = torch.arange(34)[None]
    with torch.no_grad():
        torch.testing.assert_close(trimmed(ids).logits, model(2 * ids).logits[..., ::2], rtol=0, atol=1e-6)


def test_a_folder_without_its_head_is_refused(tmp_path: Path) -> None:
    config = family_config("llama", tie_word_embeddings=False)
    weights = {name: value.clone() for name, value in build(config, seed=1).named_parameters() if "head" not in name}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="no tensor of the vocabulary's head"):
        trim_weights(tmp_path, target=tmp_path, config=config, kept_V=np.arange(9))


def test_the_trimmed_model_learns_from_the_whole_one(two_ranks: RankPool, tiny_assets: Path, tmp_path: Path) -> None:
    output = tmp_path / "trimmed"
    trim_model(
        str(tiny_assets / "teacher"), corpora=[str(tiny_assets / "eval.jsonl")], output=output, coverage=0.9, multiple=8
    )
    tree = settings(
        tiny_assets,
        tmp_path / "run",
        student={"model": str(output), "layers": [0, 2]},
        objective__translation={"method": "spans"},
    )
    tree["student"]["deepspeed"] = tree["teacher"]["deepspeed"]
    summary = two_ranks.run(distil, tree=tree)[0]
    assert summary is not None
    assert summary["steps"] == 6
    assert summary["eval"]["after"]["kl"] < summary["eval"]["before"]["kl"]


def test_ids_that_moved_are_not_taken_for_the_same_tokenizer(tiny_assets: Path, tmp_path: Path) -> None:
    output, teacher = tmp_path / "trimmed", tiny_assets / "teacher"
    trim_model(str(teacher), corpora=[str(tiny_assets / "eval.jsonl")], output=output, keep=300)
    sides = [AutoTokenizer.from_pretrained(folder) for folder in (teacher, output)]
    with pytest.raises(TeacherError, match="ids mean different tokens"):
        check_same_tokenizer(*sides, teacher_vocab_size=384, student_vocab_size=len(sides[1]))


def test_the_command_says_what_is_wrong(tiny_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = str(tiny_assets / "eval.jsonl"), str(tmp_path / "trimmed")
    teacher = str(tiny_assets / "teacher")
    assert main([teacher, "--corpus", corpus, "--keep", "12", "--output", output]) == 2
    assert "keep = 12: bytes, added and special tokens alone are 259" in capsys.readouterr().err
    assert not Path(output).exists()
    assert main([teacher, "--corpus", corpus, "--coverage", "0.99", "--output", output]) == 0
    assert "of the corpus's" in capsys.readouterr().out
    assert main([teacher, "--corpus", corpus, "--coverage", "0.99", "--output", output]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_tokenizer_beyond_the_weights_is_refused(tiny_assets: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_assets / "teacher")
    kept = torch.tensor([0, 1, 384]).numpy()
    with pytest.raises(ConfigError, match="has 384 rows, and the tokenizer has an id 384"):
        trim_weights(tiny_assets / "teacher", target=tmp_path, config=model.config, kept_V=kept)
