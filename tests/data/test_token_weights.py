"""Weights of records and of parts of answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from largekd.config.data import SourceConfig, SpanWeightConfig
from largekd.config.load import parse_config
from largekd.data.collate import collate
from largekd.data.packing import one_per_row
from largekd.data.samples import LoadedSamples, load_samples
from largekd.data.templates import Span
from largekd.data.token_weights import character_weights
from largekd.errors import ConfigError, DataError

THINK = {"start": "<think>", "end": "</think>", "weight": 0.25}
ANSWER = {"start": "####", "weight": 4.0}


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LoadedSamples:
    source = SourceConfig(path=str(path), **changes)
    return load_samples(source, tokenizer=tokenizer, sequence_length=200, vocab_size=400)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def talk(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def shown(text: str, *entries: dict[str, Any], answers: tuple[Span, ...] = ()) -> str:
    """The characters' weights as digits of tenths."""
    weights = character_weights(
        text,
        answers=answers or (Span(0, len(text)),),
        entries=[SpanWeightConfig(**{"start": "(", **entry}) for entry in entries],
    )
    return "".join(f"{weight * 10:.0f}"[0] if weight != 1 else "." for weight in weights.tolist())


def test_spans_of_characters() -> None:
    closed = {"end": ")", "weight": 0.3}
    assert shown("a(b)c(d)", closed) == ".333.333"
    assert shown("a(b)c(d)", {**closed, "include_markers": False}) == "..3...3."
    assert shown("a(b)c(de", closed) == ".333.333", "an open span ends with the answer"
    assert shown("ab(c)(d", {"weight": 0.5}) == "..55555", "without an end it goes on to the answer's"
    assert shown("a(b[c)d]", closed, {"start": "[", "end": "]", "weight": 0.7}) == ".3377777", "the later wins"
    assert shown("a(b[c)d]", {"start": "[", "end": "]", "weight": 0.7}, closed) == ".3333377"
    assert shown("(a)(b)(c", closed, answers=(Span(3, 5),)) == "...33...", "nothing outside of answers"
    assert shown("ask ( b)c", closed, answers=(Span(6, 9),)) == "......33.", "the prompt has opened it"
    assert shown("ask ( b)c", {**closed, "include_markers": False}, answers=(Span(6, 9),)) == "......3.."


def test_tokens_take_the_weight_of_their_first_character(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    answer = "<think>the fox 🙂 café</think>so the dog\n#### 12"
    path = write(tmp_path / "a.jsonl", talk("hello <think>no</think>", answer))
    samples = load(path, tokenizer, span_weights=[THINK, ANSWER]).samples
    ids, weights, mask = samples.ids(0), samples.token_weights(0), samples.label_mask(0)
    assert weights.dtype == np.float32
    assert len(weights) == len(ids)
    by_weight = {w: tokenizer.decode(ids[(weights == np.float32(w)) & (mask == 1)].tolist()) for w in (0.25, 1, 4)}
    assert by_weight[0.25] == "<think>the fox 🙂 café</think>"
    assert by_weight[1] == "so the dog\n<|im_end|>", "the end of the turn is not a part of the answer"
    assert by_weight[4] == "#### 12"
    assert (weights[mask == 0] == 1).all(), "a prompt's markers mean nothing"


def test_batches_carry_the_product_of_both_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {**talk("hello", "<think>fox</think>dog"), "w": 3},
        {**talk("hello", "the dog"), "w": 0},
        {"text": "a document: <think>1</think>", "w": 0.5},
    )
    samples = load(path, tokenizer, weight_field="w", span_weights=[THINK]).samples
    rows = list(one_per_row(samples.lengths, order=np.arange(3)))
    batch = collate(rows, samples=samples, sequence_length=200, packing=False)
    for place in range(3):
        tokens, own = samples.ids(place), samples.token_weights(place)
        for at in range(int(samples.lengths[place])):
            mask = samples.label_mask(place)
            learnt = mask is None or mask[at + 1]
            weight = (3, 0, 0.5)[place] * (1 if own is None else own[at + 1]) * learnt
            assert batch.token_weight_BS[place, at] == weight, (place, at, tokens[at])
    assert {0.75, 3.0} <= set(batch.token_weight_BS[0].tolist())
    counted = (batch.counted_T // batch.input_ids_BS.shape[1]).tolist()
    assert set(counted) == {0, 2}, "a sample of weight 0 counts nowhere"
    assert samples.token_weights(2) is None, "documents have no answers"


def test_all_tokens_learnt_still_weighs_answers_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", talk("<think>a</think>", "<think>b</think>"), talk("only a question"))
    samples = load(path, tokenizer, loss_on="all", span_weights=[THINK]).samples
    ids, weights = samples.ids(0), samples.token_weights(0)
    assert tokenizer.decode(ids[weights != 1].tolist()) == "<think>b</think>"
    assert (samples.token_weights(1) == 1).all()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1, r"column 'w' holds -1.0, expected a number of at least 0"),
        (float("nan"), r"column 'w' holds nan, expected"),
        (float("inf"), r"column 'w' holds inf, expected"),
        ("2", r"column 'w' holds a str, expected a number"),
        (True, r"column 'w' holds a bool, expected a number"),
        (None, r"column 'w' holds nothing, expected"),
        (10**400, r"column 'w' holds a number that is too large"),
    ],
)
def test_bad_weights_are_set_aside(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, value: object, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fox", "w": 2}, {"text": "dog", "w": value})
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}"):
        load(path, tokenizer, weight_field="w")
    loaded = load(path, tokenizer, weight_field="w", max_bad_frac=0.5)
    assert loaded.samples.weights.tolist() == [2.0]


def test_parquet_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": ["fox", "dog", "fox"], "w": [1, 0, 3], "s": ["a", "b", "c"]}).to_parquet(path)
    assert load(path, tokenizer, weight_field="w").samples.weights.tolist() == [1.0, 0.0, 3.0]
    with pytest.raises(DataError, match=r"data\.train\.weight_field: column 's' of .* holds .*, expected numbers"):
        load(path, tokenizer, weight_field="s")
    with pytest.raises(DataError, match=r"data\.train\.weight_field: column 'x' of .* is missing"):
        load(path, tokenizer, weight_field="x")


def test_weights_are_a_part_of_the_cache_key_and_off_by_default(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", {**talk("hello", "<think>fox</think>dog"), "w": 2, "v": 3})
    plain = load(path, tokenizer).samples
    assert plain.token_weights(0) is None
    assert plain.weights.tolist() == [1.0]
    settings: list[dict[str, Any]] = [
        {},
        {"weight_field": "w"},
        {"weight_field": "v"},
        {"span_weights": [THINK]},
        {"span_weights": [{**THINK, "weight": 0.5}]},
        {"span_weights": [{**THINK, "include_markers": False}]},
    ]
    assert len({load(path, tokenizer, **changes).samples.fingerprint for changes in settings}) == len(settings)


def test_keys_of_a_recipe() -> None:
    tree = {
        "run": {"dir": "runs/x"},
        "teacher": {"model": "t", "deepspeed": "d.json"},
        "student": {"model": "s", "deepspeed": "d.json"},
        "data": {"train": {"path": "a.jsonl", "weight_field": "w", "span_weights": [THINK, ANSWER]}, "eval": "b.jsonl"},
        "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 16},
    }
    config = parse_config(tree)
    assert config.data.train.span_weights == (SpanWeightConfig(**THINK), SpanWeightConfig(**ANSWER))
    assert config.data.eval is not None
    assert config.data.eval.span_weights == ()
    assert parse_config(config.model_dump(mode="json")) == config
    for change, message in (
        ({"weight": -1}, r"data\.train\.span_weights\.0\.weight = -1"),
        ({"start": ""}, r"data\.train\.span_weights\.0\.start = ''"),
        ({"ende": "x"}, r"data\.train\.span_weights\.0\.ende: unknown key; did you mean"),
    ):
        tree["data"]["train"]["span_weights"] = [{**THINK, **change}]
        with pytest.raises(ConfigError, match=message):
            parse_config(tree)
