"""Continuous batching: every answer is the one that plain transformers writes for its prompt alone."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rollout_jobs import prompts
from tiny import save_tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM, Qwen3NextConfig

from largekd.generation.continuous import ContinuousWriter, Finished, Prompt
from largekd.generation.growing_cache import keeps_keys_and_values_alone
from largekd.generation.row_draws import RowRule
from largekd.generation.writer import StopTokens

LONGEST = 12
UNSURE = 1e-5
"""Logit gap or mass below which two computations may choose differently."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "writer", seed=1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def wanted(count: int, *, rule: RowRule, stop: tuple[str, ...] = (), longest: int = LONGEST) -> list[Prompt]:
    uniforms = np.random.default_rng(5).random((count, longest))
    return [
        Prompt(str(place), np.array(ids, np.int32), rule, uniforms[place], stop)
        for place, ids in enumerate(prompts(count=count))
    ]


def spelt(ids) -> str:
    return "".join(f"<{token}>" for token in ids)


def written(model, asked: list[Prompt], *, batch_size: int, ends: tuple[int, ...] = (2,)) -> dict[str, Finished]:
    writer = ContinuousWriter(
        model,
        stops=StopTokens(ends=ends, fill=2),
        batch_size=batch_size,
        ids=101,
        decode=spelt,
        device=torch.device("cpu"),
        together=False,
    )
    found = list(writer.write(iter(asked), stopping=lambda: False))
    assert len(found) == len(asked)
    return {finished.key: finished for finished in found}


def plain(model, prompt: Prompt, *, ends: tuple[int, ...]) -> list[int]:
    """The likeliest ids, without a cache, token by token."""
    ids: list[int] = []
    while len(ids) < len(prompt.uniforms):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.ids.tolist(), *ids]])).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in ends:
            return ids[:-1]
    return ids


def some_ends(model, asked: list[Prompt]) -> tuple[int, ...]:
    """Ids that end some answers early, so that rows come and go: what comes late in an answer for the first time."""
    late = set()
    for prompt in asked:
        ids = plain(model, prompt, ends=())
        late |= {token for place, token in enumerate(ids) if place in (1, 4, 7) and token not in ids[:place]}
    return tuple(sorted(late)[::3])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 40])
def test_greedy_answers_are_those_of_plain_transformers(model, batch_size):
    asked = wanted(23, rule=RowRule(temperature=0.0))
    ends = some_ends(model, asked)
    found = written(model, asked, batch_size=batch_size, ends=ends)
    unsure = [key for key, finished in found.items() if finished.least_margin < UNSURE]
    assert len(unsure) <= 2
    lengths = set()
    for prompt in asked:
        if prompt.key not in unsure:
            assert list(found[prompt.key].ids) == plain(model, prompt, ends=ends)
            lengths.add(found[prompt.key].tokens)
    assert len(lengths) > 1, "the answers should end at several lengths"
    assert {finished.finish for finished in found.values()} == {"stop", "length"}


@pytest.mark.parametrize(
    "rule", [RowRule(1.0), RowRule(1.3, top_p=0.9), RowRule(0.8, top_k=7), RowRule(1.0, min_p=0.05)]
)
def test_draws_do_not_depend_on_the_batch(model, rule):
    asked = wanted(17, rule=rule)
    alone = {prompt.key: written(model, [prompt], batch_size=1)[prompt.key] for prompt in asked}
    together = written(model, asked[::-1], batch_size=5)
    sure = [key for key in alone if alone[key].least_margin >= UNSURE]
    assert len(sure) >= 8
    for key in sure:
        assert together[key].ids == alone[key].ids
        assert together[key].mean_logp == pytest.approx(alone[key].mean_logp, abs=1e-5)
    assert len({finished.ids for finished in alone.values()}) > 10


def test_a_pass_takes_prompts_of_similar_lengths_and_equal_ones_once(model):
    rng = np.random.default_rng(11)
    ids = [rng.integers(3, 101, count).astype(np.int32) for count in (40, 5, 38, 6, 39, 5)]
    uniforms = rng.random((4 * len(ids), LONGEST))
    asked = [
        Prompt(f"{text}.{sample}", ids[text], RowRule(1.0), uniforms[4 * text + sample])
        for text in range(len(ids))
        for sample in range(4)
    ]
    alone = {prompt.key: written(model, [prompt], batch_size=1)[prompt.key] for prompt in asked}
    passes: list[tuple[int, int]] = []

    def watch(_module, _arguments, keywords):
        if keywords["input_ids"].shape[1] > 1:
            passes.append(tuple(keywords["input_ids"].shape))

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        together = written(model, asked, batch_size=len(asked))
    finally:
        handle.remove()
    assert sorted(passes) == [(3, 6), (3, 40)]
    for key, finished in alone.items():
        assert together[key].ids == finished.ids or finished.least_margin < UNSURE
    assert len({finished.ids for finished in together.values()}) > 20


def test_rows_of_one_batch_have_rules_of_their_own(model):
    greedy, warm = wanted(6, rule=RowRule(0.0)), wanted(6, rule=RowRule(1.5))
    mixed = [greedy[place] if place % 2 else warm[place] for place in range(6)]
    found = written(model, mixed, batch_size=6)
    for prompt in mixed:
        (alone,) = written(model, [prompt], batch_size=1).values()
        assert found[prompt.key].ids == alone.ids or alone.least_margin < UNSURE


def test_log_probabilities_are_those_of_a_forward_pass(model):
    (prompt,) = wanted(1, rule=RowRule(0.7))
    (finished,) = written(model, [prompt], batch_size=1, ends=(-1,)).values()
    ids = list(finished.ids)
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([[*prompt.ids.tolist(), *ids]])).logits[0].log_softmax(-1)
    expected = logp[len(prompt.ids) - 1 : -1].gather(-1, torch.tensor(ids)[:, None]).mean()
    assert len(ids) == LONGEST and finished.mean_logp == pytest.approx(float(expected), abs=1e-5)


def test_a_stop_text_ends_an_answer(model):
    (prompt,) = wanted(1, rule=RowRule(0.0))
    free = plain(model, prompt, ends=())
    # A text that begins inside one token and ends inside the next.
    stop = f"{free[3]}><{free[4]}"
    stopped = Prompt(prompt.key, prompt.ids, prompt.rule, prompt.uniforms, (stop,))
    (finished,) = written(model, [stopped], batch_size=2, ends=(-1,)).values()
    assert list(finished.ids) == free[: next(n for n in range(1, 13) if stop in spelt(free[:n]))]
    assert finished.finish == "stop"


def test_prompts_are_taken_when_there_is_room_and_no_more_once_stopped(model):
    taken: list[str] = []

    def asked() -> Iterator[Prompt]:
        for prompt in wanted(20, rule=RowRule(0.0)):
            taken.append(prompt.key)
            yield prompt

    writer = ContinuousWriter(
        model, stops=StopTokens(ends=(2,), fill=2), batch_size=4, ids=101, decode=spelt,
        device=torch.device("cpu"), together=False,
    )  # fmt: skip
    ended: list[str] = []
    for finished in writer.write(asked(), stopping=lambda: len(ended) >= 5):
        assert len(taken) <= len(ended) + 4
        ended.append(finished.key)
    assert 5 <= len(ended) < 12 and len(taken) < 20


def test_a_sliding_window_sees_what_it_should(model):
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.1, max_position_embeddings=64,
    )  # fmt: skip
    windowed = MistralForCausalLM(config).eval()
    asked = wanted(9, rule=RowRule(0.0))
    found = written(windowed, asked, batch_size=3)
    for prompt in asked:
        assert (
            list(found[prompt.key].ids) == plain(windowed, prompt, ends=(2,)) or found[prompt.key].least_margin < UNSURE
        )


def test_a_model_with_another_state_is_told_apart():
    assert keeps_keys_and_values_alone(LlamaConfig(num_hidden_layers=2))
    assert not keeps_keys_and_values_alone(
        Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    )
