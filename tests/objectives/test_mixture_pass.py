"""Several teachers in the fused pass against float64 autograd: value and gradient for every way to weigh them."""

from dataclasses import dataclass, replace

import pytest
import torch
from pydantic import TypeAdapter
from vocabulary_reference import TOKENS, VOCAB, Case, divergence64, logits64, make_case

from largekd.config.divergence import DivergenceConfig
from largekd.contracts import MIXTURE_NAMES, MixtureSignal
from largekd.objectives.plugins import PluginTerm
from largekd.objectives.selection import SelectionRule, bounded
from largekd.objectives.terms import VocabularyTerm, divergence_of
from largekd.objectives.vocabulary import VocabularyPass

NAMES = (
    "forward_kl", "reverse_kl", "bidirectional_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl",
    "total_variation", "alpha_beta", "logit_mse", "ranking_hinge", "sorted_distance",
)  # fmt: skip
WEIGHTS = (0.5, 0.3, 0.2)
SCALE = 0.7


def divergence(name: str):
    if name == "cross_entropy":
        return None
    return divergence_of(TypeAdapter(DivergenceConfig).validate_python({"name": name}), plugins={})


@dataclass
class Mixed:
    """A case with several teachers, and their weights by the words of the reference."""

    case: Case
    signal: MixtureSignal
    kind: str

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.case.hidden_BSD, self.case.weight_VD, self.case.bias_V) if t is not None]


def make_mixed(kind: str = "fixed", *, members: int = 3, widths: tuple[int, ...] = (), **options) -> Mixed:
    case = make_case(**options)
    signals = [case.signal]
    for place in range(1, members):
        width = widths[place - 1] if widths else options.get("teacher_vocab", VOCAB)
        signals.append(make_case(**{**options, "teacher_vocab": width}, seed=10 + place).signal)
    generator = torch.Generator().manual_seed(5)
    route_T = torch.randint(-1, members, case.batch.counted_T.shape, generator=generator)
    weights = torch.tensor(WEIGHTS[:members], dtype=torch.float64)
    signal = MixtureSignal(
        members=tuple(signals),
        log_weight_M=(weights / weights.sum()).log().float(),
        confidence_scale=SCALE if kind == "confidence" else None,
        route_T=route_T if kind == "routed" else None,
        learned=kind == "learned",
    )
    return Mixed(case, signal, kind)


def run(mixed: Mixed, *, names, temperature=1.0, chunk=7, signal=None, batch=None, compile=False, **options):
    terms = [VocabularyTerm(name, divergence(name)) for name in names]
    case = mixed.case
    module = VocabularyPass(terms=terms, chunk_tokens=chunk, compile=compile, selection=options.pop("selection", None))
    return module(
        case.hidden_BSD,
        case.weight_VD,
        case.bias_V,
        vocab_size=case.vocab_size,
        batch=batch or case.batch,
        signal=signal or mixed.signal,
        scales=torch.full((len(names),), 0.25),
        temperature=None if temperature == 1.0 else torch.tensor(temperature),
        head_scale=case.head_scale,
        softcap=case.softcap,
        **options,
    )


@dataclass
class Reference:
    """Of each counted token: weights, responsibilities, the mixture, the student, and the members at temperature 1."""

    weight_TM: torch.Tensor
    posterior_TM: torch.Tensor
    p_TV: torch.Tensor
    q_TV: torch.Tensor
    members_MTV: torch.Tensor
    student_TV: torch.Tensor


def reference(mixed: Mixed, *, temperature: float) -> Reference:
    case, rows = mixed.case, mixed.case.batch.counted_T
    z = logits64(case.hidden_BSD, case.weight_VD, case.bias_V, case.vocab_size, case.head_scale, case.softcap)[rows]
    heads = [(member.hidden_BSE, member.head) for member in mixed.signal.members]
    shared = min(z.shape[1], *(head.vocab_size for _, head in heads))
    teachers = torch.stack(
        [logits64(h, x.weight_VD, x.bias_V, x.vocab_size, x.scale, x.softcap)[rows, :shared] for h, x in heads]
    )
    plain = teachers.softmax(-1)
    weight = mixed.signal.log_weight_M.double().exp().expand(len(rows), -1)
    if mixed.kind == "confidence":
        entropy = -torch.xlogy(plain, plain).sum(-1).T
        weight = weight * torch.exp(-entropy / SCALE)
        weight = weight / weight.sum(-1, keepdim=True)
    if mixed.kind == "routed":
        one_hot = torch.nn.functional.one_hot(mixed.signal.route_T.clamp_min(0), len(heads)).double()
        weight = torch.where(mixed.signal.route_T[:, None] >= 0, one_hot, weight)
    labels = case.batch.labels_BS.flatten()[rows]
    likelihood = plain[:, torch.arange(len(rows)), labels.clamp_max(shared - 1)].T * (labels < shared)[:, None]
    joint = weight * likelihood
    posterior = joint / joint.sum(-1, keepdim=True)
    return Reference(
        weight,
        torch.where((labels < shared)[:, None], posterior, 0.0),
        torch.einsum("tm,mtv->tv", weight, (teachers / temperature).softmax(-1)),
        (z[:, :shared] / temperature).softmax(-1),
        plain,
        z[:, :shared].softmax(-1),
    )


def token_weights(mixed: Mixed) -> torch.Tensor:
    return mixed.case.batch.token_weight_BS.flatten()[mixed.case.batch.counted_T].double()


def check(mixed: Mixed, *, names, temperature=1.0, tolerance=2e-5, **options) -> None:
    """Sums, and the gradients of hidden states, head and bias."""
    result = run(mixed, names=names, temperature=temperature, **options)
    known = reference(mixed, temperature=temperature)
    sums = torch.stack([(token_weights(mixed) * divergence64(name, known.p_TV, known.q_TV)).sum() for name in names])
    torch.testing.assert_close(result["sums"].double(), sums.detach(), rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad((0.25 * sums).sum(), mixed.leaves)
    for actual, expected in zip(torch.autograd.grad(result["loss"], mixed.leaves), wanted, strict=True):
        assert float((actual.double() - expected.double()).norm() / expected.double().norm()) < tolerance


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["fixed", "confidence", "routed", "learned"])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_equals_the_float64_reference(name, kind, temperature) -> None:
    # Its slope is a sign, which rounding may turn where both sorted probabilities nearly agree.
    tolerance = 2e-3 if name == "sorted_distance" else 2e-5
    check(make_mixed(kind), names=[name], temperature=temperature, tolerance=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS])
@pytest.mark.parametrize("kind", ["fixed", "confidence", "routed"])
def test_chunks_of_any_size(kind, chunk) -> None:
    check(make_mixed(kind), names=["forward_kl", "reverse_kl"], temperature=2.0, chunk=chunk)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"scale": 0.25},
        {"softcap": 3.0},
        {"padded_rows": 15, "bias": True},
        {"teacher_vocab": VOCAB + 30, "widths": (VOCAB - 30, VOCAB + 7)},
        {"teacher_vocab": VOCAB - 11, "widths": (VOCAB, VOCAB), "bias": True, "softcap": 4.0, "padded_rows": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["confidence", "learned"])
def test_heads_of_unequal_widths(options, kind, temperature) -> None:
    """Scale, bias, soft cap, padding, and members that are wider or narrower: the ids that all have take part."""
    check(make_mixed(kind, **options), names=["forward_kl", "reverse_kl", "jsd"], temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float64_agrees_to_rounding(temperature) -> None:
    mixed = make_mixed("confidence", dtype=torch.float64, bias=True, softcap=5.0, teacher_vocab=VOCAB - 30)
    # The weights travel in float32.
    check(mixed, names=["forward_kl", "reverse_kl"], temperature=temperature, tolerance=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fixed", "confidence"])
def test_half_precision_equals_the_reference_of_the_same_inputs(kind, dtype) -> None:
    check(make_mixed(kind, dtype=dtype), names=["forward_kl", "reverse_kl"], temperature=2.0, tolerance=2**-7)


def test_a_bias_of_minus_infinity_removes_an_id_for_one_member_or_for_all() -> None:
    """What one member cannot say keeps the others' mass; what none can say is no outcome."""
    mixed = make_mixed("fixed", bias=True)
    labels = mixed.case.batch.labels_BS
    labels[(labels == 3) | (labels == 9)] = 5
    with torch.no_grad():
        mixed.signal.members[0].head.bias_V[3] = float("-inf")
        for member in mixed.signal.members:
            member.head.bias_V[9] = float("-inf")
    result = run(mixed, names=["forward_kl"])
    known = reference(mixed, temperature=1.0)
    p_TV, q_TV = (side.clone() for side in (known.p_TV, known.q_TV))
    q_TV[:, 9] = 0.0
    q_TV = q_TV / q_TV.sum(-1, keepdim=True)
    value = (torch.xlogy(p_TV, p_TV) - torch.xlogy(p_TV, q_TV)).nan_to_num(0.0).sum(-1)
    assert float(result["sums"][0]) == pytest.approx(float((token_weights(mixed) * value).sum().detach()), rel=1e-5)
    assert float(known.p_TV[:, 3].min()) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weight_on_one_member_is_that_member_bit_for_bit(dtype, temperature) -> None:
    mixed = make_mixed("learned", members=2, dtype=dtype, bias=True)
    names = ["cross_entropy", "forward_kl", "reverse_kl", "jsd"]
    for place in (0, 1):
        weights = torch.zeros(2)
        weights[place] = 1.0
        signal = replace(mixed.signal, log_weight_M=weights.log())
        one, other = (
            run(mixed, names=names, temperature=temperature, signal=given, measure=True)
            for given in (signal, mixed.signal.members[place])
        )
        assert torch.equal(one["loss"], other["loss"]) and torch.equal(one["sums"], other["sums"])
        assert torch.equal(one["health"], other["health"])
        gradients = [torch.autograd.grad(result["loss"], mixed.leaves) for result in (one, other)]
        for mine, theirs in zip(*gradients, strict=True):
            assert torch.equal(mine, theirs)


def test_a_routed_token_learns_from_its_member_alone_bit_for_bit() -> None:
    mixed = make_mixed("routed", members=2)
    signal = replace(mixed.signal, route_T=torch.ones_like(mixed.signal.route_T))
    one, other = (run(mixed, names=["forward_kl"], signal=given) for given in (signal, mixed.signal.members[1]))
    assert torch.equal(one["sums"], other["sums"])


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["fixed", "confidence", "routed", "learned"])
def test_figures_of_the_members(kind, temperature, measure) -> None:
    mixed = make_mixed(kind, teacher_vocab=VOCAB - 30)
    labels = mixed.case.batch.labels_BS.flatten()[mixed.case.batch.counted_T]
    assert (labels >= VOCAB - 30).any(), "the case has a label that no teacher knows"
    result = run(mixed, names=["forward_kl"], temperature=temperature, measure=measure)
    known, weight_T = reference(mixed, temperature=1.0), token_weights(mixed)
    figures = dict(zip(MIXTURE_NAMES, result["mixture"].double(), strict=True))
    torch.testing.assert_close(figures["weight"], weight_T @ known.weight_TM, rtol=1e-5, atol=1e-5)
    if kind == "learned" or measure:
        torch.testing.assert_close(figures["responsibility"], weight_T @ known.posterior_TM, rtol=1e-5, atol=1e-5)
    if measure:
        kl_TM = (known.members_MTV * (known.members_MTV / known.student_TV).log()).sum(-1).T
        torch.testing.assert_close(figures["kl_t1"], (weight_T @ kl_TM).detach(), rtol=1e-5, atol=1e-5)
        assert torch.isinf(figures["teacher_ce"]).all()
    else:
        assert not figures["kl_t1"].any() and not figures["teacher_ce"].any()


def test_health_is_that_of_the_mixture() -> None:
    mixed = make_mixed("confidence")
    health = run(mixed, names=["forward_kl"], temperature=2.0, measure=True)["health"].double()
    known, weight_T = reference(mixed, temperature=1.0), token_weights(mixed)
    p_TV, labels = known.p_TV, mixed.case.batch.labels_BS.flatten()[mixed.case.batch.counted_T]
    expected = {
        5: -torch.xlogy(p_TV, p_TV).sum(-1),
        6: -p_TV[torch.arange(len(labels)), labels].log(),
        7: divergence64("forward_kl", p_TV, known.student_TV),
        8: (p_TV.argmax(-1) == known.student_TV.argmax(-1)).double(),
    }
    for place, value_T in expected.items():
        assert float(health[place]) == pytest.approx(float((weight_T * value_T).sum().detach()), rel=1e-5)


def test_a_batch_in_two_parts_gives_the_same_sums_and_gradients() -> None:
    mixed = make_mixed("routed")
    counted_T = mixed.case.batch.counted_T
    whole = run(mixed, names=["forward_kl"], measure=True)
    parts = []
    for span in (slice(0, 5), slice(5, None), slice(0, 0)):
        signal = replace(mixed.signal, route_T=mixed.signal.route_T[span])
        batch = replace(mixed.case.batch, counted_T=counted_T[span])
        parts.append(run(mixed, names=["forward_kl"], signal=signal, batch=batch, measure=True))
    assert not parts[2]["mixture"].any() and float(parts[2]["loss"].detach()) == 0.0
    for name in ("sums", "mixture", "health"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result["loss"], mixed.leaves) for result in (whole, *parts)]
    for expected, *found in zip(*gradients, strict=True):
        torch.testing.assert_close(sum(found), expected, rtol=1e-4, atol=1e-5)


def test_padded_rows_of_members_have_no_influence() -> None:
    mixed = make_mixed("confidence", padded_rows=9)
    before = run(mixed, names=["forward_kl"])["sums"]
    for member in mixed.signal.members:
        member.head.weight_VD[VOCAB:] = 1e4
    assert torch.equal(run(mixed, names=["forward_kl"])["sums"], before)


def test_a_selection_scores_the_mixture() -> None:
    mixed = make_mixed("fixed")
    known = reference(mixed, temperature=1.0)
    entropy_T = -torch.xlogy(known.p_TV, known.p_TV).sum(-1)
    limit = entropy_T.median().float() + 1e-3
    result = run(mixed, names=["forward_kl"], selection=SelectionRule("teacher_entropy", True), limit=bounded(limit))
    kept_T = (entropy_T > limit).double() * token_weights(mixed)
    assert float(result["kept"][0]) == pytest.approx(float(kept_T.sum()), rel=1e-5)
    expected = (kept_T * divergence64("forward_kl", known.p_TV, known.q_TV)).sum()
    assert float(result["sums"][0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_term_of_the_users_reads_the_mixture(temperature) -> None:
    mixed = make_mixed("confidence")

    def forward(rows):
        p, q = rows.teacher_logits_RV.softmax(-1), rows.student_logits_RV.log_softmax(-1)
        return (p * (p.log() - q)).sum(-1)

    case = mixed.case
    module = VocabularyPass(terms=[VocabularyTerm("own", PluginTerm(forward))], chunk_tokens=7)
    result = module(
        case.hidden_BSD,
        case.weight_VD,
        vocab_size=case.vocab_size,
        batch=case.batch,
        signal=mixed.signal,
        scales=torch.ones(1),
        temperature=None if temperature == 1.0 else torch.tensor(temperature),
    )
    own = run(mixed, names=["forward_kl"], temperature=temperature)
    torch.testing.assert_close(result["sums"], own["sums"], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(result["loss"], mixed.leaves), torch.autograd.grad(own["loss"], mixed.leaves), strict=True
    ):
        torch.testing.assert_close(mine, 4 * theirs, rtol=1e-4, atol=1e-5)


def test_no_call_holds_a_gradient_while_gradients_are_off() -> None:
    mixed = make_mixed("learned")
    with torch.no_grad():
        result = run(mixed, names=["forward_kl"], measure=True)
    assert not result["loss"].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["fixed", "confidence", "routed", "learned"])
def test_compiled_equals_eager(kind, temperature, caplog) -> None:
    outcomes = []
    for compiles in (False, True):
        mixed = make_mixed(kind, bias=True, softcap=5.0)
        result = run(mixed, names=["forward_kl", "jsd"], temperature=temperature, compile=compiles)
        outcomes.append([result["sums"], result["mixture"], *torch.autograd.grad(result["loss"], mixed.leaves)])
    assert "compilation failed" not in caplog.text
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
