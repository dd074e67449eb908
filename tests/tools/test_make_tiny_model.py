"""The tiny model is the same on every machine and usable by plain transformers."""

import json
from pathlib import Path

import make_tiny_model
import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    arguments = ["--layers", "2", "--text", str(folder), "--samples", "50"]
    assert make_tiny_model.main([str(folder / "one"), *arguments]) == 0
    assert make_tiny_model.main([str(folder / "two"), *arguments]) == 0
    return folder


def test_same_arguments_same_bytes(made: Path) -> None:
    names = {path.name for path in (made / "one").iterdir()}
    assert "model.safetensors" in names
    for name in names:
        assert (made / "one" / name).read_bytes() == (made / "two" / name).read_bytes(), name


def test_plain_transformers_loads_it(made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made / "one")
    tokenizer = AutoTokenizer.from_pretrained(made / "one")
    assert len(tokenizer) == model.config.vocab_size == 384
    assert model.config.num_hidden_layers == 2
    text = json.loads((made / "train.jsonl").read_text().splitlines()[0])["text"]
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    assert 1 < entropy < 5.8, "far from uniform (5.95 nats) and from certain"


def test_chat_template_marks_turns(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "one")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]


def test_training_and_evaluation_text_differ_and_are_right(made: Path) -> None:
    train, held_out = (
        [json.loads(line)["text"] for line in (made / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (50, 40)
    assert train != held_out
    for text in train:
        sum_text = text.split(". ")[-2]
        expression, total = sum_text.split(" = ")
        left, sign, right = expression.split()
        assert int(total) == int(left) + (int(right) if sign == "+" else -int(right))


def test_impossible_shape_is_refused(tmp_path: Path) -> None:
    assert make_tiny_model.main([str(tmp_path / "x"), "--hidden", "30", "--heads", "4"]) == 2
    assert make_tiny_model.main([str(tmp_path / "x"), "--vocab", "100"]) == 2
    assert not (tmp_path / "x").exists()
