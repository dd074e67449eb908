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


def divergence64(name: str, p: Tensor, q: Tensor, mix: float) -> Tensor:
    """Textbook formulas with torch.xlogy, so that 0·log 0 = 0; per row."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)

    m = mix * p + (1 - mix) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: mix * kl(p, m) + (1 - mix) * kl(q, m),
    }[name]()


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
