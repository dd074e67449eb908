"""Several training sets: shares, temperature, order, resume; one set stays what it was."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from largekd.config.data import SourceConfig, SpanWeightConfig
from largekd.config.load import parse_config
from largekd.data.loader import RowLoader, RowSettings
from largekd.data.mixture import Mixture, make_mixture, tempered_shares
from largekd.data.samples import load_samples
from largekd.data.store import SampleStore, joined
from largekd.errors import ConfigError, DataError

MakeStore = Callable[..., SampleStore]
SETTINGS = RowSettings(sequence_length=16, packing=True, global_batch_size=4, seed=3)
SIZES = (50, 10, 4)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 2.0, 5.0, 1e9])
def test_shares_follow_the_temperature(temperature: float) -> None:
    shares = tempered_shares((1000, 100, 10), temperature=temperature)
    if temperature >= 0.5:
        powers = [size ** (1 / temperature) for size in (1000, 100, 10)]
        np.testing.assert_allclose(shares, np.array(powers) / sum(powers), rtol=1e-12)
    assert shares.sum() == pytest.approx(1)
    if temperature == 1e9:
        np.testing.assert_allclose(shares, 1 / 3, rtol=1e-6)


def test_an_epoch_has_its_shares_of_as_many_samples_as_there_are() -> None:
    assert make_mixture(SIZES, shares=(2, 1, 1), temperature=1).counts == (32, 16, 16)
    assert make_mixture(SIZES, shares=None, temperature=1).counts == SIZES
    assert make_mixture((5, 5, 5), shares=(0.1, 0.1, 0.2), temperature=1).counts == (4, 4, 7)
    for temperature in (0.7, 1.3, 3.0):
        counts = make_mixture(SIZES, shares=None, temperature=temperature).counts
        exact = tempered_shares(SIZES, temperature=temperature) * sum(SIZES)
        assert sum(counts) == sum(SIZES)
        assert np.abs(np.array(counts) - exact).max() < 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_sample_comes_again_before_all_of_its_source_have_come(shuffle: bool) -> None:
    mixture = make_mixture(SIZES, shares=(1, 1, 2), temperature=1)
    seen: Counter[int] = Counter()
    for epoch in range(9):
        order = mixture.order(epoch=epoch, seed=5, shuffle=shuffle)
        sources = np.digitize(order, np.cumsum(SIZES)[:-1])
        assert tuple(np.bincount(sources, minlength=3)) == mixture.counts == (16, 16, 32)
        seen.update(order.tolist())
        for source, start in enumerate(np.cumsum([0, *SIZES[:-1]])):
            times = [seen[int(start) + place] for place in range(SIZES[source])]
            assert max(times) - min(times) <= 1


def test_order_is_a_function_of_epoch_and_seed() -> None:
    mixture = make_mixture(SIZES, shares=(1, 1, 2), temperature=1)

    def order(**changes: Any) -> list[int]:
        return mixture.order(**{"epoch": 2, "seed": 5, "shuffle": True, **changes}).tolist()

    assert order() == order()
    assert order() != order(epoch=3)
    assert order() != order(seed=6)
    assert sorted(order()) != sorted(order(seed=6)), "another seed chooses other samples"
    # Evenly among each other: each quarter of an unshuffled epoch has its part of every source.
    plain = np.array(order(shuffle=False, epoch=0)).reshape(4, 16)
    for part in plain:
        assert Counter(np.digitize(part, np.cumsum(SIZES)[:-1]).tolist()) == {0: 4, 1: 4, 2: 8}
    assert [id for id in plain.reshape(-1).tolist() if id < 50] == list(range(16)), "a source in its own order"


def test_each_sample_once_is_the_default() -> None:
    mixture = make_mixture(SIZES, shares=None, temperature=1)
    for epoch in range(3):
        assert sorted(mixture.order(epoch=epoch, seed=0, shuffle=True)) == list(range(sum(SIZES)))


def test_a_share_of_less_than_a_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture\.others\.1\.source: its share 0\.001 of 64 samples is less"):
        make_mixture(SIZES, shares=(0.5, 0.499, 0.001), temperature=1)


def ids_of(steps: list) -> list[list[int]]:
    return [[id for batch in step for id in batch.sample_ids] for step in steps]


def loader(
    store: SampleStore, *, mixture: Mixture | None, settings: RowSettings = SETTINGS, **changes: Any
) -> RowLoader:
    options = {"micro_batch_size": 2, "max_epochs": 3, "prefetch_steps": 0, **changes}
    return RowLoader(store, settings=settings, mixture=mixture, **options)


@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_hold_the_shares_and_do_not_depend_on_ranks(make_store: MakeStore, shuffle: bool) -> None:
    store = make_store([9] * sum(SIZES))
    mixture = make_mixture(SIZES, shares=(1, 1, 2), temperature=1)
    settings = replace(SETTINGS, shuffle=shuffle)
    alone = ids_of(list(loader(store, mixture=mixture, settings=settings)))
    assert len(alone) == 3 * 16
    for epoch in range(3):
        flat = [id for step in alone[16 * epoch : 16 * (epoch + 1)] for id in step]
        assert tuple(np.bincount(np.digitize(flat, np.cumsum(SIZES)[:-1]))) == mixture.counts
        assert sorted(flat) == sorted(mixture.order(epoch=epoch, seed=SETTINGS.seed, shuffle=shuffle).tolist())
    ranks = [
        list(loader(store, mixture=mixture, settings=settings, micro_batch_size=1, rank=rank, world_size=2))
        for rank in range(2)
    ]
    assert [first + second for first, second in zip(*map(ids_of, ranks), strict=True)] == alone


def test_a_mixed_loader_resumes_at_every_step(make_store: MakeStore) -> None:
    store = make_store(np.random.default_rng(0).integers(1, 17, sum(SIZES)).tolist())
    mixture = make_mixture(SIZES, shares=None, temperature=3)
    straight = ids_of(list(loader(store, mixture=mixture)))
    for stop in range(0, len(straight) + 1, 3):
        stopped = loader(store, mixture=mixture)
        for _, _ in zip(range(stop), stopped, strict=False):
            pass
        state = json.loads(json.dumps(stopped.state()))
        resumed = loader(store, mixture=mixture)
        resumed.restore(state)
        assert state["step"] == stop
        assert ids_of(list(resumed)) == straight[stop:]


def test_another_mixture_is_refused_on_resume(make_store: MakeStore) -> None:
    store = make_store([9] * sum(SIZES))
    state = loader(store, mixture=make_mixture(SIZES, shares=None, temperature=2)).state()
    for other in (None, make_mixture(SIZES, shares=None, temperature=3)):
        with pytest.raises(DataError, match="mixture was"):
            loader(store, mixture=other).restore(state)
    with pytest.raises(DataError, match="mixture was None"):
        loader(store, mixture=make_mixture(SIZES, shares=None, temperature=2)).restore(
            loader(store, mixture=None).state()
        )


def test_one_source_is_what_it_was(make_store: MakeStore) -> None:
    store = make_store([9] * 20)
    assert joined([store]) is store
    state = loader(store, mixture=None).state()
    assert set(state) == {
        *("epoch", "step_in_epoch", "step", "fingerprint"),
        *("sequence_length", "packing", "global_batch_size", "seed", "shuffle"),
    }
    (first, *_) = ids_of(list(loader(store, mixture=None, settings=replace(SETTINGS, packing=False))))
    assert first == np.random.default_rng((SETTINGS.seed, 0)).permutation(20)[:4].tolist()


def test_joined_samples_are_those_of_the_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stores = []
    for name, spans in (("plain", ()), ("weighted", (SpanWeightConfig(start="fox", weight=0.5),))):
        path = tmp_path / f"{name}.jsonl"
        talk = [{"role": "user", "content": f"hello {name}"}, {"role": "assistant", "content": "the fox jumps"}]
        rows = [{"messages": talk}, {"text": ""}, {"messages": [*talk[:1], {"role": "assistant", "content": name}]}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = SourceConfig(path=str(path), span_weights=spans, max_bad_frac=0.5)
        loaded = load_samples(source, tokenizer=tokenizer, sequence_length=128, vocab_size=len(tokenizer))
        stores.append(loaded.samples)
    both = joined(stores)
    assert len(both) == 4 and both.lengths.tolist() == [*stores[0].lengths, *stores[1].lengths]
    for place in range(4):
        own, index = stores[place // 2], place % 2
        np.testing.assert_array_equal(both.ids(place), own.ids(index))
        np.testing.assert_array_equal(both.label_mask(place), own.label_mask(index))
        weights = own.token_weights(index)
        if weights is None:
            assert both.token_weights(place) is None
        else:
            np.testing.assert_array_equal(both.token_weights(place), weights)
    assert stores[1].token_weights(0).min() == 0.5
    assert both.fingerprint not in {store.fingerprint for store in stores}
    assert both.fingerprint != joined(stores[::-1]).fingerprint
    assert both.text_fingerprint != joined(stores[::-1]).text_fingerprint


def mixed(**mixture: Any) -> dict[str, Any]:
    return {
        "run": {"dir": "runs/x"},
        "teacher": {"model": "t", "deepspeed": "ds_configs/teacher_zero3.json"},
        "student": {"model": "s", "deepspeed": "ds_configs/zero3.json"},
        "data": {"train": "a.jsonl", "mixture": mixture},
        "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 16},
    }


def test_sources_and_shares_are_configured() -> None:
    others = [{"source": "b.jsonl", "share": 1}, {"source": {"path": "c.jsonl", "max_samples": 5}, "share": 2.5}]
    data = parse_config(mixed(share=0.5, others=others)).data
    assert [(key, source.path) for key, source in data.training_sources] == [
        ("data.train", "a.jsonl"),
        ("data.mixture.others.0.source", "b.jsonl"),
        ("data.mixture.others.1.source", "c.jsonl"),
    ]
    assert data.mixture.shares == (0.5, 1.0, 2.5)
    assert parse_config(mixed(others=[{"source": "b.jsonl"}], temperature=2)).data.mixture.shares is None


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"others": [{"source": "b.jsonl", "share": 1}]}, "the share of every source"),
        ({"share": 1, "others": [{"source": "b.jsonl", "share": 1}], "temperature": 2}, "only one of both"),
        ({"share": 1, "others": []}, "at least 1"),
        ({"share": 0, "others": [{"source": "b.jsonl", "share": 1}]}, "greater than 0"),
    ],
)
def test_contradictions_are_refused(mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(mixed(**mixture))
