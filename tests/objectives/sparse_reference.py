"""Sparse signals made from a case's dense teacher, and one call for a pass, for the tests of sparse readings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from vocabulary_reference import Case, logits64

from largekd.contracts import Batch, Distribution, TopKSignal
from largekd.objectives import divergences
from largekd.objectives.readings import SparseKind
from largekd.objectives.selection import SelectionRule
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass

SPARSE_DIVERGENCES: Mapping[str, divergences.Divergence] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "bidirectional_kl": divergences.BidirectionalKL(0.5, 0.5),
    "jsd": divergences.JSD(mix=0.5),
    "skewed_forward_kl": divergences.SkewedForwardKL(skew=0.1),
    "skewed_reverse_kl": divergences.SkewedReverseKL(skew=0.1),
    "adaptive_kl": divergences.AdaptiveKL(head_mass=0.5),
    "total_variation": divergences.total_variation,
    "alpha_beta": divergences.AlphaBeta(alpha=0.5, beta=0.5),
}
"""Those that mean something on sparse rows, with the parameters of the configuration."""


def teacher_logits64(case: Case) -> Tensor:
    """(counted tokens, shared ids) in float64."""
    head = case.signal.head
    z = logits64(case.signal.hidden_BSE, head.weight_VD, head.bias_V, head.vocab_size, head.scale, head.softcap)
    return z[case.batch.counted_T, : min(case.vocab_size, head.vocab_size)]


def student_logits64(case: Case) -> Tensor:
    """(counted tokens, all ids of the student) in float64, differentiable."""
    z = logits64(case.hidden_BSD, case.weight_VD, case.bias_V, case.vocab_size, case.head_scale, case.softcap)
    return z[case.batch.counted_T]


def top_k(case: Case, *, k: int, temperature: float = 1.0) -> TopKSignal:
    """The teacher's k likeliest shared ids in float64."""
    logp_TW = teacher_logits64(case).log_softmax(-1)
    logp_TK, ids_TK = logp_TW.topk(k, dim=-1)
    rest_TW = logp_TW.scatter(-1, ids_TK, float("-inf"))
    tails = (torch.logsumexp(rest_TW / t, -1) for t in (1.0, temperature))
    return TopKSignal(ids_TK, logp_TK, *tails, vocab_size=logp_TW.shape[-1])


def run_pass(
    case: Case,
    *,
    terms: Sequence[VocabularyTerm],
    signal: Distribution | None,
    scales: Sequence[float] | None = None,
    chunk: int = 7,
    temperature: float = 1.0,
    batch: Batch | None = None,
    compile: bool = False,
    sparse: SparseKind = "tail",
    selection: SelectionRule | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """A pass over the case; `scales` are 1 unless given."""
    module = VocabularyPass(terms=terms, chunk_tokens=chunk, sparse=sparse, selection=selection, compile=compile)
    return module(
        case.hidden_BSD,
        case.weight_VD,
        case.bias_V,
        vocab_size=case.vocab_size,
        batch=case.batch if batch is None else batch,
        signal=signal,
        scales=torch.tensor([1.0] * len(terms) if scales is None else list(scales)),
        temperature=None if temperature == 1.0 else torch.tensor(temperature),
        head_scale=case.head_scale,
        softcap=case.softcap,
        **options,
    )


def terms_of(*names: str) -> tuple[VocabularyTerm, ...]:
    return tuple(VocabularyTerm(n, None if n == "cross_entropy" else SPARSE_DIVERGENCES[n]) for n in names)


def gradients(case: Case, loss: Tensor) -> list[Tensor]:
    leaves = [t for t in (case.hidden_BSD, case.weight_VD, case.bias_V) if t is not None]
    return list(torch.autograd.grad(loss, leaves))


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def same(case: Case, loss: Tensor, expected: Tensor, *, value: float, slope: float) -> None:
    """Two losses of one case: values, and gradients of hidden states, head and bias."""
    torch.testing.assert_close(loss.detach().double(), expected.detach().double(), rtol=value, atol=value)
    for actual, wanted in zip(gradients(case, loss), gradients(case, expected), strict=True):
        assert actual.dtype == wanted.dtype
        assert relative(actual, wanted) < slope


def with_counted(case: Case, chosen: Tensor) -> Batch:
    """The batch with some of the counted positions."""
    return replace(case.batch, counted_T=case.batch.counted_T[chosen])
