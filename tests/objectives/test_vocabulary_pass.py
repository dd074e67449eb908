"""The fused pass against float64 autograd: values and gradients of every term, in every shape that can occur."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vocabulary_reference import TOKENS, VOCAB, Case, logits64, make_case, reference

from largekd.contracts import HEALTH_NAMES, TEACHER_HEALTH_NAMES, HiddenSignal, VocabularyHead
from largekd.objectives.divergences import JSD, forward_kl, reverse_kl
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass

DIVERGENCES = {"cross_entropy": None, "forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": JSD(mix=0.3)}
ALL = list(DIVERGENCES)
SCALES = {"cross_entropy": 0.5, "forward_kl": 0.03, "reverse_kl": 0.2, "jsd": 1.7}


def run(case: Case, *, names=ALL, temperature=1.0, chunk=7, measure=False, compiles=False, signal=True):
    terms = [VocabularyTerm(n, DIVERGENCES[n]) for n in names]
    module = VocabularyPass(terms=terms, chunk_tokens=chunk, compile=compiles)
    return module(
        case.hidden_BSD,
        case.weight_VD,
        case.bias_V,
        vocab_size=case.vocab_size,
        batch=case.batch,
        signal=case.signal if signal else None,
        scales=torch.tensor([SCALES[n] for n in names]),
        measure=measure,
        temperature=None if temperature == 1.0 else torch.tensor(temperature),
        head_scale=case.head_scale,
        softcap=case.softcap,
    )


def leaves(case: Case) -> list[torch.Tensor]:
    return [t for t in (case.hidden_BSD, case.weight_VD, case.bias_V) if t is not None]


def gradients(case: Case, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves(case)))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(case: Case, *, names=ALL, temperature=1.0, chunk=7, value=1e-5, slope=1e-5, **options) -> None:
    """Sums, loss and the gradients of hidden states, head and bias."""
    result = run(case, names=names, temperature=temperature, chunk=chunk, **options)
    sums = reference(case, names=names, temperature=temperature, mix=0.3)
    expected = (sums * torch.tensor([SCALES[n] for n in names]).double()).sum()
    torch.testing.assert_close(result["sums"].double(), sums.detach(), rtol=value, atol=value)
    torch.testing.assert_close(result["loss"].double(), expected.detach(), rtol=value, atol=value)
    for actual, wanted in zip(gradients(case, result["loss"]), gradients(case, expected), strict=True):
        assert actual.dtype == wanted.dtype
        assert relative(actual, wanted) < slope


@pytest.mark.parametrize("chunk", [1, 7, TOKENS])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("names", [[name] for name in ALL] + [ALL], ids=lambda names: "+".join(names))
def test_float32_equals_the_float64_reference(names, temperature, chunk) -> None:
    check(make_case(), names=names, temperature=temperature, chunk=chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("names", [[name] for name in ALL] + [ALL], ids=lambda names: "+".join(names))
def test_half_precision_equals_the_reference_of_the_same_inputs(names, temperature, dtype) -> None:
    # 27 tokens average the projections' rounding much less than a training batch does
    check(make_case(dtype=dtype), names=names, temperature=temperature, value=2e-3, slope=2**-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float64_agrees_to_rounding(temperature) -> None:
    """The formulas themselves, free of rounding: every part of the head at once."""
    case = make_case(dtype=torch.float64, bias=True, scale=0.7, softcap=5.0, teacher_vocab=VOCAB - 30, padded_rows=2)
    check(case, temperature=temperature, value=1e-12, slope=1e-7)  # scales are float32: 0.7 ulp of them at most


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"scale": 0.25},
        {"softcap": 3.0},
        {"bias": True, "scale": 2.0, "softcap": 4.0},
        {"padded_rows": 15},
        {"padded_rows": 15, "bias": True},
        {"teacher_vocab": VOCAB + 30},
        {"teacher_vocab": VOCAB - 30},
        {"teacher_vocab": VOCAB - 30, "bias": True, "softcap": 4.0, "padded_rows": 3},
    ],
    ids=str,
)
def test_heads(options, temperature) -> None:
    """Bias, scale, soft cap, padded rows, and a teacher that is wider or narrower (shared ids only)."""
    check(make_case(**options), temperature=temperature)


def test_padded_rows_have_no_gradient_and_no_influence() -> None:
    case = make_case(padded_rows=15, bias=True)
    with torch.no_grad():
        case.weight_VD[VOCAB:] = 1e4
        case.bias_V[VOCAB:] = float("nan")
        case.signal.head.weight_VD[VOCAB:] = 1e4
    _, weight, bias = gradients(case, run(case)["loss"])
    assert torch.isfinite(weight).all() and weight[:VOCAB].abs().sum() > 0
    assert not weight[VOCAB:].any() and not bias[VOCAB:].any()


def test_wider_student_keeps_cross_entropy_over_all_its_ids() -> None:
    """Ids that only the student has: cross-entropy may move them, the divergences may not."""
    case = make_case(teacher_vocab=VOCAB - 30)
    soft = gradients(case, run(case, names=["forward_kl", "reverse_kl", "jsd"])["loss"])[1]
    assert not soft[VOCAB - 30 :].any()
    assert gradients(case, run(case, names=["cross_entropy"])["loss"])[1][VOCAB - 30 :].abs().sum() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_bias_of_minus_infinity_removes_an_id_from_the_support(side, temperature) -> None:
    """The divergences then are those of the case in which neither head has the id."""
    case = make_case(bias=True)
    gone = torch.tensor([0, 7, VOCAB - 1])
    kept = torch.tensor([v for v in range(VOCAB) if v not in gone])
    labels = case.batch.labels_BS
    labels[(labels[..., None] == gone).any(-1)] = 5
    with torch.no_grad():
        if side != "teacher":
            case.bias_V[gone] = float("-inf")
        if side != "student":
            case.signal.head.bias_V[gone] = float("-inf")
    head = case.signal.head
    small = replace(
        case,
        weight_VD=case.weight_VD.detach()[kept].requires_grad_(),
        bias_V=case.bias_V.detach()[kept].requires_grad_(),
        vocab_size=len(kept),
        signal=replace(
            case.signal,
            head=VocabularyHead(weight_VD=head.weight_VD[kept], vocab_size=len(kept), bias_V=head.bias_V[kept]),
        ),
    )
    names = ["forward_kl", "reverse_kl", "jsd"]
    loss, wanted = (run(c, names=names, temperature=temperature)["loss"] for c in (case, small))
    torch.testing.assert_close(loss, wanted)
    actual, expected = gradients(case, loss), gradients(small, wanted)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1][kept], expected[1])
    torch.testing.assert_close(actual[2][kept], expected[2])
    assert not actual[1][gone].any() and not actual[2][gone].any()
    everything = run(case, temperature=temperature, measure=True)
    assert all(torch.isfinite(t).all() for t in [everything["health"], *gradients(case, everything["loss"])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_equal_to_student_gives_nothing(dtype, temperature) -> None:
    case = make_case(dtype=dtype, bias=True, scale=1.5, softcap=6.0)
    head = VocabularyHead(case.weight_VD.detach(), VOCAB, case.bias_V.detach(), case.head_scale, case.softcap)
    case = replace(case, signal=HiddenSignal(case.hidden_BSD.detach(), head))
    result = run(case, names=["forward_kl", "reverse_kl", "jsd"], temperature=temperature)
    assert (result["sums"].abs() / case.batch.counted_T.numel()).max() < 1e-6
    assert max(g.abs().max() for g in gradients(case, result["loss"])) < 1e-5


def test_terms_together_equal_the_sum_of_terms_alone() -> None:
    case = make_case()
    together = gradients(case, run(case)["loss"])
    alone = [gradients(case, run(case, names=[name])["loss"]) for name in ALL]
    for index, gradient in enumerate(together):
        torch.testing.assert_close(gradient, sum(parts[index] for parts in alone), rtol=1e-5, atol=1e-6)
    sums = torch.cat([run(case, names=[name])["sums"] for name in ALL])
    torch.testing.assert_close(run(case)["sums"], sums)


def test_masked_positions_have_no_gradient() -> None:
    case = make_case()
    gradient = gradients(case, run(case)["loss"])[0][0]
    counted = case.batch.labels_BS[0] >= 0
    assert not gradient[~counted].any()
    assert (gradient[counted].abs().sum(-1) > 0).all()


def test_rows_of_several_sequences_are_flat_positions() -> None:
    case = make_case()
    two = replace(
        case,
        hidden_BSD=torch.cat([torch.full_like(case.hidden_BSD, 9.0), case.hidden_BSD]).detach().requires_grad_(),
        signal=replace(case.signal, hidden_BSE=case.signal.hidden_BSE.repeat(2, 1, 1)),
        batch=replace(
            case.batch,
            labels_BS=case.batch.labels_BS.repeat(2, 1),
            token_weight_BS=case.batch.token_weight_BS.repeat(2, 1),
            counted_T=case.batch.counted_T + TOKENS,
        ),
    )
    loss = run(two)["loss"]
    torch.testing.assert_close(loss, run(case)["loss"])
    gradient = gradients(two, loss)[0]
    assert not gradient[0].any()
    torch.testing.assert_close(gradient[1:], gradients(case, run(case)["loss"])[0])


def test_zero_counted_tokens_keep_the_graph() -> None:
    case = make_case(bias=True)
    case = replace(case, batch=replace(case.batch, counted_T=case.batch.counted_T[:0]))
    result = run(case, measure=True)
    assert result["loss"].item() == 0 and result["loss"].requires_grad
    assert not result["sums"].any() and not result["health"].any()
    for gradient, leaf in zip(gradients(case, result["loss"]), leaves(case), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_zero_scales_give_zero_gradients() -> None:
    case = make_case()
    module = VocabularyPass(
        terms=[VocabularyTerm("forward_kl", forward_kl)],
        chunk_tokens=8,
    )
    arguments = {"vocab_size": VOCAB, "batch": case.batch, "signal": case.signal, "scales": torch.zeros(1)}
    result = module(case.hidden_BSD, case.weight_VD, **arguments)
    assert result["sums"].item() > 0
    assert not any(g.any() for g in gradients(case, result["loss"]))


@pytest.mark.parametrize("factor", [0.25, -3.0, 65536.0])
def test_incoming_gradient_multiplies(factor) -> None:
    case = make_case(bias=True)
    plain = gradients(case, run(case)["loss"])
    for scaled, gradient in zip(gradients(case, run(case)["loss"] * factor), plain, strict=True):
        torch.testing.assert_close(scaled, gradient * factor)


def test_tiny_scales_do_not_underflow_in_half_precision() -> None:
    """A weight over a count of 10^7 with a loss scale of 2^20 on top: float16 cannot hold the product without."""
    case = make_case(dtype=torch.float16)
    module = VocabularyPass(
        terms=[VocabularyTerm("forward_kl", forward_kl)],
        chunk_tokens=8,
    )
    arguments = {"vocab_size": VOCAB, "batch": case.batch, "signal": case.signal, "scales": torch.tensor([1e-7])}
    result = module(case.hidden_BSD, case.weight_VD, **arguments)
    expected = reference(case, names=["forward_kl"], temperature=1.0)[0] * 1e-7 * 2**20
    for actual, wanted in zip(gradients(case, result["loss"] * 2**20), gradients(case, expected), strict=True):
        assert relative(actual, wanted) < 2**-7


def test_only_wanted_gradients_are_computed() -> None:
    case, frozen = make_case(), make_case()
    frozen.weight_VD.requires_grad_(False)
    with NewStorage(*tensors_of(frozen)) as seen:
        loss = run(frozen, chunk=4)["loss"]
        (hidden,) = torch.autograd.grad(loss, frozen.hidden_BSD)
    torch.testing.assert_close(hidden, gradients(case, run(case, chunk=4)["loss"])[0])
    assert seen.elements < frozen.weight_VD.numel()


def test_hidden_states_may_be_wider_than_the_head() -> None:
    case = make_case(dtype=torch.bfloat16)
    wide = replace(case, hidden_BSD=case.hidden_BSD.detach().float().requires_grad_())
    (hidden, _), (expected, _) = (gradients(c, run(c)["loss"]) for c in (wide, case))
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, expected.float(), rtol=2**-7, atol=1e-4)


def test_a_second_backward_is_refused() -> None:
    case = make_case()
    loss = run(case)["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="run the pass again"):
        loss.backward()


class NewStorage(TorchDispatchMode):
    """Records the number of elements of the largest storage that is allocated while the mode is on."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def many_tokens() -> Case:
    """Four times the counted tokens, so that full logits would be much larger than either head."""
    case = make_case(bias=True, softcap=5.0)
    case = replace(case, batch=replace(case.batch, counted_T=case.batch.counted_T.repeat(4)))
    assert case.batch.counted_T.numel() * VOCAB > 2 * case.signal.head.weight_VD.numel()
    return case


def tensors_of(case: Case) -> list[torch.Tensor]:
    head = case.signal.head
    tensors = [*leaves(case), case.signal.hidden_BSE, head.weight_VD, head.bias_V, case.batch.counted_T]
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("measure", [False, True])
def test_full_logits_never_exist(measure) -> None:
    """The largest tensor that a pass makes is the head's gradient."""
    case = many_tokens()
    with NewStorage(*tensors_of(case)) as seen:
        run(case, temperature=2.0, chunk=4, measure=measure)["loss"].backward()
    assert seen.elements == case.weight_VD.numel()


@pytest.mark.parametrize("way", ["no_grad", "frozen"])
def test_without_gradients_none_are_allocated(way) -> None:
    case = many_tokens()
    expected = run(case, chunk=4)["loss"].detach()
    if way == "frozen":
        for leaf in leaves(case):
            leaf.requires_grad_(False)
    with torch.set_grad_enabled(way == "frozen"), NewStorage(*tensors_of(case)) as seen:
        result = run(case, chunk=4, measure=True)
    assert not result["loss"].requires_grad
    assert seen.elements <= VOCAB * 8  # blocks of float32, not the head's gradient
    torch.testing.assert_close(result["loss"], expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_vocab", [VOCAB, VOCAB - 30])
def test_health_figures(temperature, teacher_vocab) -> None:
    case = make_case(teacher_vocab=teacher_vocab)
    health = dict(zip(HEALTH_NAMES, run(case, temperature=temperature, measure=True)["health"].double(), strict=True))
    rows, head = case.batch.counted_T, case.signal.head
    z = logits64(case.hidden_BSD, case.weight_VD, None, VOCAB, 1.0, None)[rows].detach()
    p = logits64(case.signal.hidden_BSE, head.weight_VD, None, teacher_vocab, 1.0, None)[rows].softmax(-1)
    q = z[:, :teacher_vocab].softmax(-1)
    labels, weight = case.batch.labels_BS.flatten()[rows], case.batch.token_weight_BS.flatten()[rows].double()
    expected = {
        "token_weight": torch.ones_like(weight),
        "ce": torch.nn.functional.cross_entropy(z, labels, reduction="none"),
        "student_top1_correct": (z.argmax(-1) == labels).double(),
        "student_entropy": -(q * q.log()).sum(-1),
        "signal_weight": torch.ones_like(weight),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "teacher_ce": torch.nn.functional.pad(p, (0, VOCAB - teacher_vocab))
        .log()
        .gather(-1, labels[:, None])[:, 0]
        .neg(),
        "kl_t1": (p * (p / q).log()).sum(-1),
        "top1_agree": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    assert set(expected) == set(HEALTH_NAMES)
    for name, value_R in expected.items():
        torch.testing.assert_close(health[name], (value_R * weight).sum(), rtol=1e-5, atol=1e-5, msg=name)


def test_top1_figures_count() -> None:
    """Labels and teacher that agree with the student at every second token."""
    case = make_case()
    z = logits64(case.hidden_BSD, case.weight_VD, None, VOCAB, 1.0, None).detach()
    counted = case.batch.counted_T
    case.batch.labels_BS[0, counted[::2]] = z.argmax(-1)[counted[::2]]
    head = VocabularyHead(case.weight_VD.detach(), VOCAB)
    hidden = case.hidden_BSD.detach().clone()
    hidden[0, counted[::2]] *= -1
    case = replace(case, signal=HiddenSignal(hidden, head))
    health = dict(zip(HEALTH_NAMES, run(case, measure=True)["health"], strict=True))
    weight = case.batch.token_weight_BS[0]
    torch.testing.assert_close(health["student_top1_correct"], weight[counted[::2]].sum())
    torch.testing.assert_close(health["top1_agree"], weight[counted[1::2]].sum())


def test_without_a_teacher() -> None:
    case = make_case()
    result = run(case, names=["cross_entropy"], measure=True, signal=False)
    torch.testing.assert_close(result["loss"], run(case, names=["cross_entropy"])["loss"])
    health = dict(zip(HEALTH_NAMES, result["health"], strict=True))
    assert all(health[name] == 0 for name in TEACHER_HEALTH_NAMES)
    with_teacher = dict(zip(HEALTH_NAMES, run(case, names=["cross_entropy"], measure=True)["health"], strict=True))
    assert health["signal_weight"] == 0 and with_teacher["signal_weight"] == with_teacher["token_weight"]
    for name in set(HEALTH_NAMES) - set(TEACHER_HEALTH_NAMES) - {"signal_weight"}:
        torch.testing.assert_close(health[name], with_teacher[name])
    assert with_teacher["kl_t1"] > 0
    with pytest.raises(AssertionError, match="no teacher signal"):
        run(case, signal=False)


def test_teacher_may_have_another_dtype() -> None:
    case = make_case()
    half = make_case(dtype=torch.bfloat16)
    case = replace(case, signal=half.signal)
    check(case, value=2e-3, slope=2**-7)
