"""What is read off a teacher's hidden states in a few ids, against float64."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from largekd.contracts import (
    IGNORE_LABEL,
    Batch,
    HiddenSignal,
    SampledRequest,
    TopKRequest,
    TopKSignal,
    Translation,
    VocabularyHead,
)
from largekd.objectives.divergences import JSD, forward_kl, reverse_kl
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass
from largekd.teachers import readout as module
from largekd.teachers.readout import Readout, scored_rows, translated

POSITIONS, WIDTH, VOCAB = 30, 16, 67


def make_readout(*, spread: float = 2.0, bias: bool = False, vocab: int = VOCAB, seed: int = 0, **head) -> Readout:
    """A head with two rows of padding; logits have about the spread that is asked for."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB + 2, WIDTH, generator=g) * spread / WIDTH**0.5
    bias_V = torch.randn(VOCAB + 2, generator=g) if bias else None
    return Readout(torch.randn(POSITIONS, WIDTH, generator=g), VocabularyHead(weight, VOCAB, bias_V, **head), vocab)


def logp64(readout: Readout) -> Tensor:
    """(positions, ids that take part)."""
    head, ids = readout.head, readout.vocab_size
    z = readout.hidden_PE.double() @ head.weight_VD[:ids].double().T
    z = head.scale * (z if head.bias_V is None else z + head.bias_V[:ids].double())
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)).log_softmax(-1)


def tails64(logp_TW: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return torch.logsumexp(logp_TW.scatter(-1, ids_TK, float("-inf")) / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 6, VOCAB - 1])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "scale": 2.0, "softcap": 4.0}, {"vocab": VOCAB - 9, "spread": 12.0}], ids=str
)
def test_likeliest_ids_with_exact_tails(options, k, temperature) -> None:
    readout = make_readout(**options)
    rows = torch.tensor([3, 29, 0, 7, 7])
    signal = readout.top_k(rows, request=TopKRequest(k=k, temperature=temperature))
    logp_TW = logp64(readout)[rows]
    ids = min(k, readout.vocab_size)
    wanted, wanted_ids = logp_TW.topk(ids, dim=-1)
    assert signal.ids_TK.shape == (5, ids) and signal.vocab_size == readout.vocab_size
    assert torch.equal(signal.ids_TK, wanted_ids)
    torch.testing.assert_close(signal.logp_TK.double(), wanted, rtol=1e-5, atol=2e-5)
    # Tails far below what 1 − Σ p could hold in float32 are exact too.
    for found, t in ((signal.tail_T, 1.0), (signal.tempered_tail_T, temperature)):
        torch.testing.assert_close(found.double(), tails64(logp_TW, wanted_ids, t), rtol=1e-5, atol=5e-5)


def test_small_tails_are_small_enough_to_tell() -> None:
    """The test above means something: some tails are beyond float32's 1 − Σ p."""
    readout = make_readout(vocab=VOCAB - 9, spread=12.0)
    assert readout.top_k(torch.arange(POSITIONS), request=TopKRequest(k=6)).tail_T.min() < math.log(1e-8)


def test_more_ids_than_there_are() -> None:
    signal = make_readout().top_k(torch.arange(4), request=TopKRequest(k=500, temperature=2.0))
    assert signal.ids_TK.shape == (4, VOCAB)
    assert torch.isneginf(signal.tail_T).all() and torch.isneginf(signal.tempered_tail_T).all()


@pytest.mark.parametrize("chunk", [1, 4, POSITIONS])
def test_chunks_change_nothing(monkeypatch, chunk) -> None:
    readout, rows = make_readout(), torch.arange(POSITIONS).flip(0)
    expected = readout.top_k(rows, request=TopKRequest(k=5, temperature=2.0))
    labels = torch.arange(POSITIONS) * 2
    expected_labels = readout.label_logp(rows, labels_Q=labels)
    torch.testing.assert_close(
        expected_labels.double(), logp64(readout)[rows].gather(-1, labels[:, None])[:, 0], rtol=1e-5, atol=2e-5
    )
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    found = readout.top_k(rows, request=TopKRequest(k=5, temperature=2.0))
    for name in ("logp_TK", "tail_T", "tempered_tail_T"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.ids_TK, expected.ids_TK)
    torch.testing.assert_close(readout.label_logp(rows, labels_Q=labels), expected_labels)


def test_no_rows() -> None:
    readout, none = make_readout(), torch.zeros(0, dtype=torch.int64)
    assert readout.top_k(none, request=TopKRequest(k=5)).ids_TK.shape == (0, 5)
    assert readout.sampled(none, request=SampledRequest(draws=3)).weight_TK.shape == (0, 3)
    assert readout.label_logp(none, labels_Q=none).shape == (0,)


def test_half_precision_heads() -> None:
    readout = make_readout()
    head = readout.head
    half = Readout(readout.hidden_PE.bfloat16(), replace(head, weight_VD=head.weight_VD.bfloat16()), VOCAB)
    signal = half.top_k(torch.arange(POSITIONS), request=TopKRequest(k=4))
    assert signal.logp_TK.dtype == torch.float32
    total = signal.logp_TK.exp().sum(-1) + signal.tail_T.exp()
    torch.testing.assert_close(total, torch.ones(POSITIONS))
    expected = logp64(half).gather(-1, signal.ids_TK)
    torch.testing.assert_close(signal.logp_TK.double(), expected, rtol=0, atol=0.06)


# Drawn ids


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drawn_ids_and_their_weights(temperature, power) -> None:
    """Weights are p over the proposal; ids come as often as the proposal says, within five standard errors."""
    readout, draws = make_readout(vocab=VOCAB - 9), 20_000
    request = SampledRequest(draws=draws, proposal_power=power, temperature=temperature, seed=3)
    rows = torch.tensor([5, 0, 11])
    signal = readout.sampled(rows, request=request)
    logp_TW = (logp64(readout)[rows] / temperature).log_softmax(-1)
    proposal_TW = (logp_TW * power).softmax(-1)
    assert int(signal.ids_TK.max()) < readout.vocab_size == signal.vocab_size
    torch.testing.assert_close(signal.logp_TK.double(), logp_TW.gather(-1, signal.ids_TK), rtol=1e-5, atol=2e-5)
    wanted = (logp_TW.exp() / proposal_TW).gather(-1, signal.ids_TK) / draws
    torch.testing.assert_close(signal.weight_TK.double(), wanted, rtol=1e-4, atol=0.0)
    few = readout.sampled(rows, request=replace(request, draws=3))
    wanted = (logp_TW.exp() / proposal_TW).gather(-1, few.ids_TK) / 3
    torch.testing.assert_close(few.weight_TK.double(), wanted, rtol=1e-4, atol=0.0)
    counts = torch.zeros_like(proposal_TW).scatter_add_(-1, signal.ids_TK, torch.ones(3, draws).double())
    error = (counts - draws * proposal_TW) / (draws * proposal_TW * (1 - proposal_TW)).sqrt()
    assert error[draws * proposal_TW > 20].abs().max() < 5.0


def test_seeds_decide_the_draws(monkeypatch) -> None:
    readout = make_readout()
    rows = torch.zeros(8, dtype=torch.int64)
    one, again, other = (
        readout.sampled(rows, request=SampledRequest(draws=40, seed=seed)).ids_TK for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    # Equal rows draw for themselves, also in different chunks.
    monkeypatch.setattr(module, "CHUNK_TOKENS", 4)
    chunked = readout.sampled(rows, request=SampledRequest(draws=40, seed=1)).ids_TK
    for ids in (one, chunked):
        assert len({tuple(row) for row in ids.tolist()}) == 8


# Another tokenizer


def translation_of(groups: Sequence[tuple[int, Sequence[tuple[int, int]]]], *, tokens: int) -> Translation:
    """Scored groups of one student token each: (counted token, [(teacher's position, its token), …])."""
    signal_T = torch.full((tokens,), -1)
    for place, (token, _) in enumerate(groups):
        signal_T[token] = place
    none = torch.zeros(0, dtype=torch.int64)
    row_N = torch.tensor([row for _, spelt in groups for row, _ in spelt], dtype=torch.int64)
    id_N = torch.tensor([token for _, spelt in groups for _, token in spelt], dtype=torch.int64)
    lengths_L = torch.tensor([len(spelt) for _, spelt in groups], dtype=torch.int64)
    first_L = torch.tensor([token for token, _ in groups], dtype=torch.int64)
    blank = torch.zeros(1, POSITIONS, dtype=torch.int64)
    return Translation(
        teacher=Batch(blank, torch.full_like(blank, IGNORE_LABEL), blank.float(), none),
        student_start_G=none,
        student_length_G=none,
        teacher_start_G=none,
        teacher_length_G=none,
        student_group_BS=blank,
        teacher_group_BS=blank,
        scored_first_L=first_L,
        scored_length_L=torch.ones_like(first_L),
        scored_row_L=torch.tensor([spelt[0][0] for _, spelt in groups], dtype=torch.int64),
        scored_teacher_length_L=lengths_L,
        signal_T=signal_T,
        span_G=none,
        span_first_T=none,
        span_of_U=none,
        span_token_U=none,
        row_N=row_N,
        id_N=id_N,
        scored_N=torch.repeat_interleave(torch.arange(len(groups)), lengths_L),
    )


STUDENT_IDS = 50
GROUPS = [
    (0, [(2, 9)]),  # one token, which the student has
    (1, [(3, 12), (4, 20)]),  # two tokens for one of the student's
    (3, [(6, 60), (7, 5), (8, 31)]),  # three, the first of which the student does not have
    (4, [(9, 44)]),
    (5, [(10, 3), (11, 8)]),  # two tokens, though the teacher also has the label as one, which then is of the tail
]
LABELS = torch.tensor([9, 45, 7, 46, 44, 41])  # of six counted tokens; token 2 has no group


def student_of_w() -> Tensor:
    """The first 40 ids are the student's own, 41 and 44 map to themselves, all others are the teacher's alone."""
    table = torch.full((VOCAB,), -1)
    table[:40] = torch.arange(40)
    table[[41, 44]] = torch.tensor([41, 44])
    return table


def expected_outcomes(readout: Readout, *, token: int, spelt: list[tuple[int, int]], k: int, temperature: float):
    """Entries {student's id: log p} and the tails at temperature 1 and `temperature`, id by id in float64."""
    logp = logp64(readout)
    table = student_of_w().tolist()
    merged = sum(float(logp[row, i]) for row, i in spelt)
    row_logp = logp[spelt[0][0]]
    kept_ids = row_logp.topk(k).indices.tolist()
    masses = {i: float(row_logp[i]) for i in range(VOCAB)}
    first = spelt[0][1]
    rest = math.exp(masses[first]) - math.exp(merged)
    masses[first] = math.log(rest) if rest > 1e-12 else -math.inf
    label = int(LABELS[token])
    entries, tail = {label: merged}, []
    for i, mass in masses.items():
        if i in kept_ids and table[i] >= 0 and table[i] != label:
            entries[table[i]] = mass
        elif table[i] != label or mass > -math.inf:
            tail.append(mass)
    tails = [math.log(sum(math.exp(m / t) for m in tail)) if tail else -math.inf for t in (1.0, temperature)]
    return {i: mass for i, mass in entries.items() if mass > -math.inf}, tails


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 10, VOCAB])
def test_translated_entries_and_tails(k, temperature) -> None:
    readout = make_readout(spread=1.5)
    translation = translation_of(GROUPS, tokens=len(LABELS))
    signal = translated(
        readout,
        request=TopKRequest(k=k, temperature=temperature),
        translation=translation,
        student_of_W=student_of_w(),
        labels_T=LABELS,
    )
    assert signal.present_T.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    logp = logp64(readout)
    wanted_L = torch.stack([sum(logp[row, i] for row, i in spelt) for _, spelt in GROUPS])
    torch.testing.assert_close(signal.scored_logp_L.double(), wanted_L, rtol=1e-5, atol=3e-5)
    for token, spelt in GROUPS:
        entries, (tail, tempered) = expected_outcomes(readout, token=token, spelt=spelt, k=k, temperature=temperature)
        ids, found = signal.ids_TK[token].tolist(), signal.logp_TK[token].tolist()
        assert ids[0] == LABELS[token] and all(0 <= i < STUDENT_IDS for i in ids)
        held = [(i, p) for i, p in zip(ids, found, strict=True) if p > -math.inf]
        assert len(held) == len(dict(held)), "an id counts twice"
        assert dict(held) == pytest.approx(entries, abs=1e-4)
        assert float(signal.tail_T[token]) == pytest.approx(tail, abs=1e-4)
        assert float(signal.tempered_tail_T[token]) == pytest.approx(tempered, abs=1e-4)
        total = sum(math.exp(p) for _, p in held) + math.exp(float(signal.tail_T[token]))
        assert total == pytest.approx(1.0, abs=1e-5)


def test_a_merged_token_leaves_its_first_token_the_rest() -> None:
    """Written out: the teacher says 12 then 20 where the student says 45."""
    readout = make_readout(spread=1.5)
    signal = translated(
        readout,
        request=TopKRequest(k=VOCAB),
        translation=translation_of(GROUPS, tokens=len(LABELS)),
        student_of_W=student_of_w(),
        labels_T=LABELS,
    )
    p = logp64(readout).exp()
    entries = dict(zip(signal.ids_TK[1].tolist()[::-1], signal.logp_TK[1].exp().tolist()[::-1], strict=True))
    assert entries[45] == pytest.approx(float(p[3, 12] * p[4, 20]), rel=1e-4)
    assert entries[12] == pytest.approx(float(p[3, 12] * (1 - p[4, 20])), rel=1e-4)
    assert entries[13] == pytest.approx(float(p[3, 13]), rel=1e-4)


def test_rows_without_a_group_are_absent_and_harmless() -> None:
    """Also a batch in which no token has one."""
    readout = make_readout()
    none = translation_of([], tokens=3)
    signal = translated(
        readout, request=TopKRequest(k=4, temperature=2.0), translation=none, student_of_W=student_of_w(),
        labels_T=LABELS[:3],
    )  # fmt: skip
    assert signal.present_T.tolist() == [0.0] * 3 and signal.scored_logp_L.numel() == 1
    assert not any(torch.isnan(t).any() for t in (signal.logp_TK, signal.tail_T, signal.tempered_tail_T))
    assert torch.isfinite(signal.logp_TK[:, 0]).all()
    rows, present = scored_rows(none)
    assert rows.tolist() == [0, 0, 0] and present.tolist() == [False] * 3
    rows, present = scored_rows(translation_of(GROUPS, tokens=6))
    assert rows[present].tolist() == [2, 3, 6, 9, 10] and present.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equal_tokenizers_give_the_dense_signal(temperature) -> None:
    """Every token a group of its own, the identity as map, and all ids: nothing is lost."""
    readout, tokens = make_readout(spread=1.5), 12
    g = torch.Generator().manual_seed(9)
    labels = torch.randint(0, VOCAB, (1, tokens), generator=g)
    groups = [(t, [(t, int(labels[0, t]))]) for t in range(tokens)]
    signal = translated(
        readout,
        request=TopKRequest(k=VOCAB, temperature=temperature),
        translation=translation_of(groups, tokens=tokens),
        student_of_W=torch.arange(VOCAB),
        labels_T=labels[0],
    )
    hidden = torch.randn(1, tokens, WIDTH, generator=g).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=g).mul_(0.4).requires_grad_()
    batch = Batch(labels, labels, torch.ones(1, tokens), torch.arange(tokens))
    terms = tuple(VocabularyTerm(str(i), d) for i, d in enumerate((None, forward_kl, reverse_kl, JSD(mix=0.5))))
    vocabulary = VocabularyPass(terms=terms, chunk_tokens=5)
    results = []
    dense = HiddenSignal(readout.hidden_PE[None, :tokens], readout.head)
    for given in (signal, dense):
        assert isinstance(given, TopKSignal | HiddenSignal)
        found = vocabulary(
            hidden,
            weight,
            vocab_size=VOCAB,
            batch=batch,
            signal=given,
            scales=torch.ones(4),
            temperature=None if temperature == 1.0 else torch.tensor(temperature),
        )
        results.append([found["sums"], *torch.autograd.grad(found["loss"], (hidden, weight))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_broken_teacher_gives_weights_that_are_not_finite_instead_of_an_error() -> None:
    """An error on one rank would leave the others waiting; this way the step is skipped on all of them."""
    readout = make_readout()
    readout.hidden_PE[4] = float("nan")
    signal = readout.sampled(torch.tensor([3, 4]), request=SampledRequest(draws=5))
    assert signal.weight_TK[0].isfinite().all() and signal.weight_TK[1].isnan().all()
    assert signal.ids_TK.min() >= 0 and signal.ids_TK.max() < readout.vocab_size
