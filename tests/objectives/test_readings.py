"""Sparse signals through the vocabulary pass: against the dense pass and against float64 references."""

from dataclasses import replace

import pytest
import torch
from sparse_reference import (
    SPARSE_DIVERGENCES,
    gradients,
    relative,
    run_pass,
    same,
    student_logits64,
    teacher_logits64,
    terms_of,
    top_k,
    with_counted,
)
from torch import Tensor
from vocabulary_reference import VOCAB, Case, divergence64, make_case

from largekd.contracts import HEALTH_NAMES, SampledRequest, SampledSignal, TopKSignal
from largekd.objectives.terms import VocabularyTerm
from largekd.teachers.readout import Readout

NAMES = list(SPARSE_DIVERGENCES)
KINDS = ["tail", "renormalise", "drop"]
INF = float("inf")


def permuted(signal: TopKSignal, *, seed: int = 3) -> TopKSignal:
    """The same entries in another order in each row."""
    order = torch.rand(signal.ids_TK.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return replace(signal, ids_TK=signal.ids_TK.gather(-1, order), logp_TK=signal.logp_TK.gather(-1, order))


def with_empty(signal: TopKSignal, *, seed: int = 4) -> TopKSignal:
    """The entries spread over twice as many places, the first one kept; the others are empty with arbitrary ids."""
    g = torch.Generator().manual_seed(seed)
    tokens, k = signal.ids_TK.shape
    places = torch.rand(tokens, 2 * k - 1, generator=g).argsort(-1)[:, : k - 1].sort(-1).values + 1
    places = torch.cat([torch.zeros(tokens, 1, dtype=torch.long), places], dim=-1)
    ids = torch.randint(0, signal.vocab_size, (tokens, 2 * k), generator=g)
    logp = torch.full((tokens, 2 * k), -INF, dtype=signal.logp_TK.dtype)
    return replace(
        signal, ids_TK=ids.scatter(-1, places, signal.ids_TK), logp_TK=logp.scatter(-1, places, signal.logp_TK)
    )


def sparse64(case: Case, *, name: str, kind: str, k: int, temperature: float) -> Tensor:
    """Σ_t weight_t · D of the outcomes that a reading has, from both models' whole logits."""
    teacher, student = teacher_logits64(case), student_logits64(case)
    student = student[:, : teacher.shape[-1]]
    p, q = ((z / temperature).softmax(-1) for z in (teacher, student))
    ids = teacher.topk(k, dim=-1).indices
    p, q = p.gather(-1, ids), q.gather(-1, ids)
    if kind == "tail":
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=-1) for x in (p, q))
    if kind == "renormalise":
        p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    weight = case.batch.token_weight_BS.flatten()[case.batch.counted_T].double()
    return (weight * divergence64(name, p, q)).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_all_ids_equal_the_dense_pass(name, temperature, kind) -> None:
    case = make_case(dtype=torch.float64, padded_rows=3)
    signal = permuted(top_k(case, k=VOCAB, temperature=temperature))
    assert torch.isneginf(signal.tail_T).all()
    arguments = {"terms": terms_of(name), "temperature": temperature}
    sparse = run_pass(case, signal=signal, sparse=kind, **arguments)
    dense = run_pass(case, signal=case.signal, **arguments)
    torch.testing.assert_close(sparse["sums"], dense["sums"], rtol=1e-10, atol=1e-10)
    same(case, sparse["loss"], dense["loss"], value=1e-10, slope=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "scale": 2.0, "softcap": 4.0},
        {"bias": True, "padded_rows": 15},
        {"teacher_vocab": VOCAB - 30},
        {"teacher_vocab": VOCAB + 30, "scale": 0.25},
        {"teacher_vocab": VOCAB - 30, "bias": True, "softcap": 4.0, "padded_rows": 3},
    ],
    ids=str,
)
def test_all_ids_equal_the_dense_pass_for_every_head(options, temperature) -> None:
    """All terms and cross-entropy at once; a narrower teacher leaves ids that no divergence may move."""
    case = make_case(dtype=torch.float64, **options)
    width = min(VOCAB, options.get("teacher_vocab", VOCAB))
    names = ["cross_entropy", *NAMES]
    arguments = {"terms": terms_of(*names), "temperature": temperature, "scales": [0.1 * i + 0.2 for i in range(10)]}
    sparse = run_pass(case, signal=top_k(case, k=width, temperature=temperature), **arguments)
    dense = run_pass(case, signal=case.signal, **arguments)
    torch.testing.assert_close(sparse["sums"], dense["sums"], rtol=1e-10, atol=1e-10)
    same(case, sparse["loss"], dense["loss"], value=1e-10, slope=1e-9)
    soft = run_pass(case, terms=terms_of(*NAMES), signal=top_k(case, k=9, temperature=temperature))
    assert not gradients(case, soft["loss"])[1][width:].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_some_ids_equal_the_reference(name, kind, temperature) -> None:
    case = make_case(dtype=torch.float64, bias=True, teacher_vocab=VOCAB - 30)
    expected = sparse64(case, name=name, kind=kind, k=13, temperature=temperature)
    signal = top_k(case, k=13, temperature=temperature)
    found = run_pass(case, terms=terms_of(name), signal=signal, sparse=kind, temperature=temperature)
    torch.testing.assert_close(found["sums"][0], expected.detach(), rtol=1e-10, atol=1e-10)
    same(case, found["loss"], expected, value=1e-10, slope=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 41])
@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 4e-3, 2**-6)])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_precisions(kind, dtype, value, slope, chunk) -> None:
    case = make_case(dtype=dtype, softcap=5.0)
    names = ["forward_kl", "jsd", "total_variation"]
    expected = sum(sparse64(case, name=name, kind=kind, k=5, temperature=2.0) for name in names)
    signal = top_k(case, k=5, temperature=2.0)
    found = run_pass(case, terms=terms_of(*names), signal=signal, sparse=kind, temperature=2.0, chunk=chunk)
    same(case, found["loss"], expected, value=value, slope=slope)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_entries_change_nothing(kind, temperature) -> None:
    case = make_case(dtype=torch.float64)
    signal = top_k(case, k=11, temperature=temperature)
    padded = with_empty(signal)
    assert torch.isneginf(padded.logp_TK).sum() == 11 * len(signal.ids_TK)
    arguments = {"terms": terms_of("cross_entropy", *NAMES), "sparse": kind, "temperature": temperature}
    found, expected = (run_pass(case, signal=s, measure=True, **arguments) for s in (padded, signal))
    torch.testing.assert_close(found["sums"], expected["sums"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found["health"], expected["health"], rtol=1e-11, atol=1e-11)
    same(case, found["loss"], expected["loss"], value=1e-11, slope=1e-10)


def test_an_empty_entry_that_names_the_label_is_not_the_label() -> None:
    """The teacher's cross-entropy of a label that was not kept is bounded by the tail, whatever fills empty places."""
    case = make_case(dtype=torch.float64)
    signal = top_k(case, k=2)
    labels = case.batch.labels_BS.flatten()[case.batch.counted_T]
    filled = replace(
        signal,
        ids_TK=torch.cat([signal.ids_TK, labels[:, None]], dim=-1),
        logp_TK=torch.nn.functional.pad(signal.logp_TK, (0, 1), value=-INF),
    )
    found, expected = (run_pass(case, terms=terms_of("forward_kl"), signal=s, measure=True) for s in (filled, signal))
    torch.testing.assert_close(found["health"], expected["health"])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_absent_rows_train_cross_entropy_alone(temperature) -> None:
    case = make_case(dtype=torch.float64)
    signal = top_k(case, k=6, temperature=temperature)
    present = torch.arange(len(signal.ids_TK)) % 3 != 0
    first = torch.nn.functional.pad(torch.zeros(1, 5) - INF, (1, 0), value=-1.0e4).double()
    absent = replace(
        signal,
        ids_TK=torch.where(present[:, None], signal.ids_TK, 0),
        logp_TK=torch.where(present[:, None], signal.logp_TK, first),
        tail_T=torch.where(present, signal.tail_T, 0.0),
        tempered_tail_T=torch.where(present, signal.tempered_tail_T, -INF),
        present_T=present.double(),
    )
    terms = terms_of("cross_entropy", "forward_kl", "reverse_kl")
    found = run_pass(case, terms=terms, signal=absent, temperature=temperature, measure=True)
    hard = run_pass(case, terms=terms[:1], signal=None)
    kept = replace(
        signal,
        **{n: getattr(signal, n)[present] for n in ("ids_TK", "logp_TK", "tail_T", "tempered_tail_T")},
    )
    arguments = {"signal": kept, "temperature": temperature, "batch": with_counted(case, present)}
    soft = run_pass(case, terms=terms[1:], measure=True, **arguments)
    torch.testing.assert_close(found["sums"], torch.cat([hard["sums"], soft["sums"]]))
    same(case, found["loss"], hard["loss"] + soft["loss"], value=1e-10, slope=1e-10)
    figures, wanted = (dict(zip(HEALTH_NAMES, r["health"], strict=True)) for r in (found, soft))
    for name in ("signal_weight", "teacher_entropy", "teacher_ce", "kl_t1", "top1_agree"):
        torch.testing.assert_close(figures[name], wanted[name])
    assert figures["signal_weight"] < figures["token_weight"]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation", "alpha_beta"])
def test_coarser_outcomes_never_increase_a_divergence(name, temperature) -> None:
    """The data processing inequality, token by token; alpha-beta is no f-divergence and obeys it here in the sum."""
    case = make_case(dtype=torch.float64)
    tokens = case.batch.counted_T.numel()
    for token in range(0, tokens, 5):
        batch = with_counted(case, torch.tensor([token]))
        alone = replace(case, batch=batch)
        values = [
            run_pass(alone, terms=terms_of(name), signal=s, temperature=temperature)["sums"].item()
            for s in (*(top_k(alone, k=k, temperature=temperature) for k in (1, 4, 32)), alone.signal)
        ]
        if name != "alpha_beta":
            assert values == sorted(values)
        assert 0.0 <= values[0] <= values[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_certain_teacher_is_cross_entropy(kind, temperature) -> None:
    """One id with probability 1 and nothing left; beside it empty places."""
    case = make_case(dtype=torch.float64)
    labels = case.batch.labels_BS.flatten()[case.batch.counted_T]
    none = torch.full(labels.shape, -INF, dtype=torch.float64)
    logp = torch.stack([torch.zeros_like(none), none, none], dim=-1)
    ids = torch.stack([labels, labels, torch.zeros_like(labels)], dim=-1)
    signal = TopKSignal(ids, logp, none, none)
    found = run_pass(case, terms=terms_of("forward_kl"), signal=signal, sparse=kind, temperature=temperature)
    weight = case.batch.token_weight_BS.flatten()[case.batch.counted_T].double()
    nll = -(student_logits64(case) / temperature).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    expected = (weight * nll).sum() if kind != "renormalise" else 0.0 * nll.sum()
    torch.testing.assert_close(found["loss"].double(), expected.detach(), rtol=1e-6, atol=1e-6)
    if kind == "renormalise":  # one id as if it were all: nothing to learn
        assert not any(g.any() for g in gradients(case, found["loss"]))
    else:
        same(case, found["loss"], expected, value=1e-6, slope=1e-9)
    everything = run_pass(case, terms=terms_of(*NAMES), signal=signal, sparse=kind, temperature=temperature)
    assert all(torch.isfinite(t).all() for t in [everything["sums"], *gradients(case, everything["loss"])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_rows_stay_finite(kind, temperature) -> None:
    """Weights of 0, ids that the student's bias rules out, logits of ±300, and a teacher whose mass is all tail."""
    case = make_case(bias=True)
    signal = top_k(case, k=5, temperature=temperature)
    signal.logp_TK[1] = torch.tensor([-1.0e4] + 4 * [-INF])
    signal.tail_T[1] = signal.tempered_tail_T[1] = 0.0
    with torch.no_grad():
        case.bias_V[signal.ids_TK[2, 1:3]] = -INF
        case.hidden_BSD[0, case.batch.counted_T[3]] *= 150.0
        case.batch.token_weight_BS[0, case.batch.counted_T[4]] = 0.0
    labels = case.batch.labels_BS
    labels[torch.isin(labels, signal.ids_TK[2, 1:3])] = int(signal.ids_TK[2, 0])
    terms = terms_of("cross_entropy", *NAMES)
    found = run_pass(case, terms=terms, signal=signal, sparse=kind, temperature=temperature, measure=True)
    figures = [found["sums"], found["loss"], found["health"], *gradients(case, found["loss"])]
    assert all(torch.isfinite(t).all() for t in figures)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_health_of_all_ids_equals_the_dense_pass(temperature) -> None:
    case = make_case(dtype=torch.float64)
    arguments = {"terms": terms_of("forward_kl"), "temperature": temperature, "measure": True}
    signal = permuted(top_k(case, k=VOCAB, temperature=temperature))
    found, dense = (run_pass(case, signal=s, **arguments)["health"] for s in (signal, case.signal))
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-10)


# Drawn ids


def draw(case: Case, *, seed: int, power: float, temperature: float, draws: int = 8) -> SampledSignal:
    head = case.signal.head
    readout = Readout(case.signal.hidden_BSE[0], head, min(case.vocab_size, head.vocab_size))
    request = SampledRequest(draws=draws, proposal_power=power, temperature=temperature, seed=seed)
    return readout.sampled(case.batch.counted_T, request=request)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drawn_ids_have_the_mean_of_forward_kl(temperature, power) -> None:
    """Value and every component of the gradient, within five standard errors of the dense ones."""
    case = make_case(vocab=19, teacher_vocab=17)
    terms, seeds = terms_of("forward_kl"), 400
    samples = []
    for seed in range(seeds):
        signal = draw(case, seed=seed, power=power, temperature=temperature)
        found = run_pass(case, terms=terms, signal=signal, temperature=temperature, chunk=41)
        parts = [found["loss"].detach()[None], *(g.flatten() for g in gradients(case, found["loss"]))]
        samples.append(torch.cat(parts).double())
    found_NX = torch.stack(samples)
    dense = run_pass(case, terms=terms, signal=case.signal, temperature=temperature)
    expected_X = torch.cat([dense["loss"].detach()[None], *(g.flatten() for g in gradients(case, dense["loss"]))])
    moves_X = found_NX.std(0) > 1e-6
    assert moves_X.sum() > 1000
    torch.testing.assert_close(found_NX[0, ~moves_X], expected_X[~moves_X].double(), rtol=1e-4, atol=1e-5)
    error_X = (found_NX.mean(0) - expected_X)[moves_X] / (found_NX.std(0) / seeds**0.5)[moves_X]
    assert error_X.abs().max() < 5.0
    assert 0.7 < error_X.square().mean() < 1.3


def test_more_draws_are_closer() -> None:
    case = make_case()
    dense = gradients(case, run_pass(case, terms=terms_of("forward_kl"), signal=case.signal)["loss"])[0]
    errors = []
    for draws in (4, 64, 1024):
        signal = draw(case, seed=1, power=1.0, temperature=1.0, draws=draws)
        loss = run_pass(case, terms=terms_of("forward_kl"), signal=signal)["loss"]
        errors.append(relative(gradients(case, loss)[0], dense))
    assert errors[0] > 2.5 * errors[1] > 6.0 * errors[2]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_repeated_id_counts_as_often_as_it_was_drawn(temperature) -> None:
    case = make_case(dtype=torch.float64)
    tokens = case.batch.counted_T.numel()
    ids = torch.tensor([[3, 9, 3, 3]]).expand(tokens, 4)
    logp = torch.tensor([[-1.0, -2.0, -1.0, -1.0]]).double().expand(tokens, 4)
    weight = torch.tensor([[0.25, 0.3, 0.25, 0.5]]).double().expand(tokens, 4)
    once = SampledSignal(ids[:, :2], torch.tensor([[1.0, 0.3]]).double().expand(tokens, 2), logp[:, :2])
    several = SampledSignal(ids, weight, logp)
    terms = (*terms_of("cross_entropy"), VocabularyTerm("forward_kl", SPARSE_DIVERGENCES["forward_kl"]))
    found, expected = (run_pass(case, terms=terms, signal=s, temperature=temperature) for s in (several, once))
    same(case, found["loss"], expected["loss"], value=1e-10, slope=1e-10)
    q = (student_logits64(case) / temperature).softmax(-1)
    weights = case.batch.token_weight_BS.flatten()[case.batch.counted_T].double()
    value = 1.0 * (-1.0 - q[:, 3].log()) + 0.3 * (-2.0 - q[:, 9].log())
    torch.testing.assert_close(found["sums"][1], (weights * value).sum().detach())
    alone = run_pass(case, terms=terms[1:], signal=several, temperature=temperature)
    same(case, alone["loss"], (weights * value).sum(), value=1e-6, slope=1e-6)  # 0.3 is a float32


@pytest.mark.parametrize("chunk", [1, 7, 41])
def test_drawn_ids_do_not_depend_on_chunks(chunk) -> None:
    case = make_case(dtype=torch.float64, softcap=4.0, teacher_vocab=VOCAB - 30)
    signal = draw(case, seed=7, power=0.5, temperature=2.0)
    assert signal.vocab_size == VOCAB - 30
    found, expected = (
        run_pass(case, terms=terms_of("cross_entropy", "forward_kl"), signal=signal, temperature=2.0, chunk=c)
        for c in (chunk, 5)
    )
    same(case, found["loss"], expected["loss"], value=1e-10, slope=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "sampled"])
def test_compiled_rows_equal_eager_ones(kind, caplog) -> None:
    case = make_case(teacher_vocab=VOCAB - 30)
    sampled = kind == "sampled"
    signal = (
        draw(case, seed=0, power=0.5, temperature=2.0) if sampled else with_empty(top_k(case, k=6, temperature=2.0))
    )
    terms = terms_of("cross_entropy", *(["forward_kl"] if sampled else NAMES))
    arguments = {"terms": terms, "signal": signal, "sparse": kind, "temperature": 2.0}
    found, expected = (run_pass(case, compile=compiled, **arguments) for compiled in (True, False))
    assert "compilation failed" not in caplog.text
    torch.testing.assert_close(found["sums"], expected["sums"], rtol=1e-5, atol=1e-5)
    same(case, found["loss"], expected["loss"], value=1e-5, slope=1e-5)
