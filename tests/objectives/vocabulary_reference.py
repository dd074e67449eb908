"""Float64 references with plain autograd, and small inputs, for the tests of the vocabulary pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from largekd.contracts import IGNORE_LABEL, Batch, HiddenSignal, VocabularyHead

TOKENS, VOCAB, WIDTH, TEACHER_WIDTH = 41, 401, 37, 53


@dataclass
class Case:
    """Inputs of one pass; every float tensor in `dtype`."""

    hidden_BSD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    vocab_size: int
    head_scale: float
    softcap: float | None
    batch: Batch
    signal: HiddenSignal


def make_case(
    *,
    dtype: torch.dtype = torch.float32,
    vocab: int = VOCAB,
    teacher_vocab: int = VOCAB,
    padded_rows: int = 0,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Case:
    """One row of TOKENS positions, a third of them masked, unequal token weights; logits have a spread of about 2."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).to(dtype)

    labels = torch.randint(0, vocab, (1, TOKENS), generator=g)
    labels[0, ::3] = IGNORE_LABEL
    weight = torch.rand(1, TOKENS, generator=g) + 0.5
    batch = Batch(torch.zeros_like(labels), labels, weight, (labels.flatten() != IGNORE_LABEL).nonzero().flatten())
    head = VocabularyHead(
        weight_VD=normal(teacher_vocab + padded_rows, TEACHER_WIDTH, std=2 / TEACHER_WIDTH**0.5),
        vocab_size=teacher_vocab,
        bias_V=normal(teacher_vocab + padded_rows) if bias else None,
        scale=scale,
        softcap=softcap,
    )
    return Case(
        hidden_BSD=normal(1, TOKENS, WIDTH).requires_grad_(),
        weight_VD=normal(vocab + padded_rows, WIDTH, std=2 / WIDTH**0.5).requires_grad_(),
        bias_V=normal(vocab + padded_rows).requires_grad_() if bias else None,
        vocab_size=vocab,
        head_scale=scale,
        softcap=softcap,
        batch=batch,
        signal=HiddenSignal(normal(1, TOKENS, TEACHER_WIDTH), head),
    )


def logits64(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int, scale: float, cap: float | None
) -> Tensor:
    z = hidden.reshape(-1, hidden.shape[-1]).double() @ weight[:vocab].double().T
    z = scale * (z if bias is None else z + bias[:vocab].double())
    return z if cap is None else cap * torch.tanh(z / cap)


DEFAULTS = {
    "mix": 0.5,
    "forward_weight": 0.5,
    "reverse_weight": 0.5,
    "skew": 0.1,
    "head_mass": 0.5,
    "alpha": 0.5,
    "beta": 0.5,
    "top_k": 8,
    "margin": 1.0,
}
"""Parameters of the divergences as the configuration has them."""


def divergence64(name: str, p: Tensor, q: Tensor, mix: float = 0.5, **parameters: float) -> Tensor:
    """Textbook formulas with torch.xlogy, so that 0·log 0 = 0; per row."""
    value = {**DEFAULTS, "mix": mix, **parameters}
    mix, skew, a, b = value["mix"], value["skew"], value["alpha"], value["beta"]

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, y)).sum(-1)

    def jsd() -> Tensor:
        m = mix * p + (1 - mix) * q
        return mix * kl(p, m) + (1 - mix) * kl(q, m)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "bidirectional_kl": lambda: value["forward_weight"] * kl(p, q) + value["reverse_weight"] * kl(q, p),
        "jsd": jsd,
        "skewed_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": lambda: kl(q, skew * q + (1 - skew) * p),
        "adaptive_kl": lambda: adaptive_kl64(p, q, head_mass=value["head_mass"]),
        "total_variation": lambda: 0.5 * (p - q).abs().sum(-1),
        "alpha_beta": lambda: (
            -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)
        ),
        "logit_mse": lambda: (p.log() - q.log()).var(-1, correction=0) / 2,
        "ranking_hinge": lambda: ranking_hinge64(p, q, top_k=int(value["top_k"]), margin=value["margin"]),
        "sorted_distance": lambda: sorted_distance64(p, q),
    }[name]()


def adaptive_kl64(p: Tensor, q: Tensor, *, head_mass: float) -> Tensor:
    """By a sort, outcome by outcome; expects no ties."""
    rows = []
    for p_V, q_V in zip(p, q, strict=True):
        order = p_V.argsort(descending=True)
        gap = (p_V - q_V).detach().abs()[order]
        head, mass = 0, 0.0
        while mass < head_mass and head < len(order):
            mass += float(p_V[order[head]])
            head += 1
        share = gap[:head].sum() / gap.sum()
        rows.append(share * (p_V * (p_V / q_V).log()).sum() + (1 - share) * (q_V * (q_V / p_V).log()).sum())
    return torch.stack(rows)


def ranking_hinge64(p: Tensor, q: Tensor, *, top_k: int, margin: float) -> Tensor:
    """Pair by pair; expects no ties."""
    rows = []
    for p_V, q_V in zip(p, q, strict=True):
        order = p_V.argsort(descending=True)[:top_k].tolist()
        pairs = [(i, j) for n, i in enumerate(order) for j in order[n + 1 :]]
        rows.append(sum((margin - (q_V[i] / q_V[j]).log()).clamp_min(0) for i, j in pairs) / len(pairs))
    return torch.stack(rows)


def sorted_distance64(p: Tensor, q: Tensor) -> Tensor:
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p.sort(-1).values - q.sort(-1).values).abs().sum(-1)


def reference(case: Case, *, names: list[str], temperature: float, mix: float = 0.5) -> Tensor:
    """Σ_t weight_t · D_k(t) per name, differentiable, in float64."""
    rows = case.batch.counted_T
    z = logits64(case.hidden_BSD, case.weight_VD, case.bias_V, case.vocab_size, case.head_scale, case.softcap)[rows]
    head = case.signal.head
    zt = logits64(case.signal.hidden_BSE, head.weight_VD, head.bias_V, head.vocab_size, head.scale, head.softcap)[rows]
    shared = min(z.shape[1], zt.shape[1])
    p, q = ((x[:, :shared] / temperature).softmax(-1) for x in (zt, z))
    labels, weight = (x.flatten()[rows] for x in (case.batch.labels_BS, case.batch.token_weight_BS.double()))
    hard = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    return torch.stack([(weight * (hard if n == "cross_entropy" else divergence64(n, p, q, mix))).sum() for n in names])
