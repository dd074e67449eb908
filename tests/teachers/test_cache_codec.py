"""Bytes of a cached token: what comes back, with which error, at any vocabulary size."""

import math

import pytest
import torch

from largekd.config.cache import SampledCodecConfig, TopKCodecConfig
from largekd.contracts import VocabularyHead
from largekd.teachers.cache_codec import IdPlanes, SampledCodec, TopKCodec, dense_log_probabilities
from largekd.teachers.readout import Readout

VOCABULARIES = (100, 50_000, 65_537, 152_064, 300_000)


def log_probabilities(*, tokens: int, vocab: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(tokens, vocab, generator=generator) * spread, -1)


@pytest.mark.parametrize("vocab", [*VOCABULARIES, 65_536, 131_072, 2**22, 2**24 + 5, 2**31])
@pytest.mark.parametrize("count", [1, 12, 64])
def test_ids_come_back_at_any_vocabulary_size(vocab, count):
    planes = IdPlanes(vocab, count)
    ids_TK = torch.randint(0, vocab, (50, count), generator=torch.Generator().manual_seed(1))
    ids_TK[0], ids_TK[1] = 0, vocab - 1
    rows = planes.encode(ids_TK)
    assert rows["high"].shape == (50, planes.high_bytes)
    assert torch.equal(planes.decode(rows, table=planes.table(device=ids_TK.device)), ids_TK)


@pytest.mark.parametrize(("vocab", "size"), [(49_152, 196), (128_256, 204), (151_936, 209), (262_144, 212)])
def test_bytes_of_a_token(vocab, size):
    assert TopKCodec(TopKCodecConfig(), vocab_size=vocab).token_bytes == size


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_entries_are_within_their_step(vocab, spread):
    tokens = 24
    logp_TV = log_probabilities(tokens=tokens, vocab=vocab, spread=spread)
    labels_T = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(2))
    codec = TopKCodec(TopKCodecConfig(temperatures=(2.0,)), vocab_size=vocab)
    rows = codec.encode_chunk(logp_TV.clone(), labels_C=labels_T)
    assert {name: (rows[name].dtype, rows[name].shape[1]) for name in codec.shapes} == dict(codec.shapes)
    found = codec.decode(rows)
    # The likeliest 63 in their order, and the label.
    likeliest_TK = logp_TV.topk(codec.k, dim=-1).indices
    assert torch.equal(found.ids_TK[:, :-1], likeliest_TK[:, :-1])
    assert found.ids_TK.eq(labels_T[:, None]).any(-1).all()
    # Up to the common normalisation (half a level of all entries), the error is half a level at the entry's place.
    exact_TK = logp_TV.gather(-1, found.ids_TK)
    below_TK = (exact_TK[:, 1:2] - exact_TK).clamp_min(0)
    half_level_TK = 2 / 254.5 * (below_TK / 4).exp() * 1.35 + 0.01
    error_TK = (found.logp_TK - exact_TK).abs()
    within_TK = below_TK < 4 * math.log(254.5) - 4
    assert (error_TK <= half_level_TK)[within_TK].all()
    total_T = found.logp_TK.double().exp().sum(-1) + found.tail_T.double().exp()
    torch.testing.assert_close(total_T, torch.ones_like(total_T), rtol=0, atol=1e-6)
    assert (found.logp_TK.diff(dim=-1) <= 0).all()
    rest_TV = logp_TV.scatter(-1, found.ids_TK, float("-inf"))
    torch.testing.assert_close(found.tempered[2.0], torch.logsumexp(rest_TV / 2, -1), rtol=0, atol=1e-3)


def test_divergence_of_the_decoded_distribution_is_small():
    logp_TV = log_probabilities(tokens=64, vocab=50_000)
    codec = TopKCodec(TopKCodecConfig(), vocab_size=50_000)
    found = codec.decode(codec.encode_chunk(logp_TV.clone(), labels_C=torch.zeros(64, dtype=torch.int64)))
    p_TO = torch.cat([logp_TV.gather(-1, found.ids_TK).double().exp(), torch.zeros(64, 1).double()], -1)
    p_TO[:, -1] = 1 - p_TO.sum(-1)
    q_TO = torch.cat([found.logp_TK, found.tail_T[:, None]], -1).double().exp()
    assert (p_TO * (p_TO / q_TO).log()).sum(-1).mean() < 2e-5


def test_impossible_ids_and_a_whole_vocabulary():
    logp_TV = torch.log_softmax(torch.tensor([[2.0, 1.0, 0.0, float("-inf"), float("-inf")]]), -1)
    codec = TopKCodec(TopKCodecConfig(), vocab_size=5)
    found = codec.decode(codec.encode_chunk(logp_TV.clone(), labels_C=torch.tensor([1])))
    assert codec.k == 5 and sorted(found.ids_TK[0].tolist()) == [0, 1, 2, 3, 4]
    assert torch.isneginf(found.logp_TK[0, 3:]).all() and torch.isneginf(found.tail_T).all()
    assert torch.isfinite(found.logp_TK[0, :3]).all()


def test_one_kept_id_is_the_likeliest_whatever_the_label():
    logp_TV = log_probabilities(tokens=9, vocab=1000)
    codec = TopKCodec(TopKCodecConfig(k=1), vocab_size=1000)
    found = codec.decode(codec.encode_chunk(logp_TV.clone(), labels_C=torch.full((9,), 7)))
    assert torch.equal(found.ids_TK[:, 0], logp_TV.argmax(-1))


def test_no_token_at_all():
    codec = TopKCodec(TopKCodecConfig(temperatures=(2.0,)), vocab_size=70_000)
    rows = {name: torch.zeros((0, width), dtype=dtype) for name, (dtype, width) in codec.shapes.items()}
    found = codec.decode(rows)
    assert found.ids_TK.shape == (0, 64) and found.tempered[2.0].shape == (0,)


def test_a_teacher_that_is_not_a_number_is_noticed():
    logp_TV = log_probabilities(tokens=3, vocab=500)
    logp_TV[1] = float("nan")
    codec = TopKCodec(TopKCodecConfig(), vocab_size=500)
    rows = codec.encode_chunk(logp_TV, labels_C=torch.zeros(3, dtype=torch.int64))
    assert rows["finite"].tolist() == [True, False, True]


def make_readout(*, vocab: int, positions: int = 40) -> Readout:
    generator = torch.Generator().manual_seed(3)
    head = VocabularyHead(torch.randn(vocab, 8, generator=generator), vocab)
    return Readout(torch.randn(positions, 8, generator=generator), head, vocab)


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_draws_come_back_with_their_weights(power):
    readout, rows_T = make_readout(vocab=70_000), torch.arange(40)
    config = SampledCodecConfig(kind="sampled", draws=12, proposal_power=power)
    codec = SampledCodec(config, vocab_size=70_000)
    rows = codec.encode(readout, rows_T, labels_T=rows_T, seed=5)
    found = codec.decode(rows)
    ((_, logp_TW),) = readout.log_probabilities(rows_T)
    exact_TK = logp_TW.gather(-1, found.ids_TK)
    assert (found.logp_TK - exact_TK).abs().max() < 0.6
    weight_TK = torch.full_like(exact_TK, 1 / 12)
    if power != 1.0:
        proposal_TW = torch.log_softmax(logp_TW * power, -1)
        weight_TK = (exact_TK - proposal_TW.gather(-1, found.ids_TK)).exp() / 12
    torch.testing.assert_close(found.weight_TK, weight_TK, rtol=1e-3, atol=0)
    assert codec.token_bytes == (36 + 2 if power == 1.0 else 62)


def test_twelve_draws_of_a_large_vocabulary_cost_forty_bytes():
    assert SampledCodec(SampledCodecConfig(kind="sampled"), vocab_size=151_936).token_bytes <= 40


def test_a_dense_distribution_from_a_sparse_one():
    logp_TV = log_probabilities(tokens=6, vocab=300)
    codec = TopKCodec(TopKCodecConfig(k=20), vocab_size=300)
    found = codec.decode(codec.encode_chunk(logp_TV.clone(), labels_C=torch.zeros(6, dtype=torch.int64)))
    dense_TV = dense_log_probabilities(found.ids_TK, found.logp_TK, found.tail_T, vocab_size=300)
    torch.testing.assert_close(dense_TV.logsumexp(-1), torch.zeros(6), rtol=0, atol=1e-5)
    assert torch.equal(dense_TV.gather(-1, found.ids_TK), found.logp_TK)
    others_TV = dense_TV.scatter(-1, found.ids_TK, float("nan"))
    each_T = (found.tail_T - math.log(280))[:, None].expand(-1, 300)
    torch.testing.assert_close(others_TV[~others_TV.isnan()], each_T[~others_TV.isnan()])
