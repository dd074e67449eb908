"""Router terms against their formulas in float64, and that neither fill nor the split of a step changes them."""

import itertools

import pytest
import torch
from tiny import join_rows, make_rows

from largekd.contracts import RouterTap, Taps
from largekd.objectives.alignment import AlignmentPlan
from largekd.objectives.layer_maps import LayerPair
from largekd.objectives.router import RouterPair, RouterTerms, expert_places, log_routing, mapped
from largekd.objectives.router_loads import RouterLoads

X, K, LAYERS = 6, 2, (0, 2)
NAMES = ("load_balance", "router_z", "router_kl")


def taps_of(batch, *, seed, experts=X, layers=LAYERS, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.input_ids_BS.shape, experts)
    taps = {}
    for layer in layers:
        logits = torch.randn(shape, generator=generator) * 2
        taps[layer] = RouterTap(logits.requires_grad_(grad), logits.detach().topk(K, dim=-1).indices)
    return Taps(router=taps)


def terms_of(names=NAMES, **options):
    pairs = [RouterPair(LayerPair(0, 1), compared=X), RouterPair(LayerPair(2, 1), compared=X)]
    return RouterTerms(terms=names, layers=LAYERS, experts=X, **{"pairs": pairs, **options})


def shares():
    load = torch.rand((len(LAYERS), X), generator=torch.Generator().manual_seed(5))
    return load / load.sum(1, keepdim=True)


def probabilities(logits, scoring):
    if scoring == "softmax":
        return logits.exp() / logits.exp().sum(-1, keepdim=True)
    scores = 1 / (1 + (-logits).exp())
    return scores / scores.sum(-1, keepdim=True)


def reference(student, teacher, *, batch, load, scoring="softmax"):
    """The three sums, position by position, in float64."""
    used = [(row, s.offset + i) for row, segs in enumerate(batch.segments) for s in segs for i in range(s.length)]
    sums = [torch.zeros((), dtype=torch.float64) for _ in NAMES]
    for place, layer in enumerate(LAYERS):
        for row, position in used:
            z = student[layer][row, position]
            p = probabilities(z, scoring)
            sums[0] = sums[0] + X * (load[place].double() * p).sum() / len(LAYERS)
            sums[1] = sums[1] + z.exp().sum().log() ** 2 / len(LAYERS)
            t = probabilities(teacher[row, position], "softmax")
            sums[2] = sums[2] + (t * (t / p).log()).sum() / len(LAYERS)
    return torch.stack(sums)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_values_and_gradients_are_the_formulas(scoring, packed):
    batch = join_rows(make_rows(count=3, packed=packed))
    student, teacher = taps_of(batch, seed=1, grad=True), taps_of(batch, seed=2, layers=(1,))
    load = shares()
    sums, _ = terms_of(scoring=scoring)(student, teacher, batch=batch, load_LX=load)
    exact = {layer: tap.logits_BSX.detach().double().requires_grad_() for layer, tap in student.router.items()}
    wanted = reference(exact, teacher.router[1].logits_BSX.double(), batch=batch, load=load, scoring=scoring)
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-6, atol=0)
    for name, own, right in zip(NAMES, sums, wanted, strict=True):
        mine = torch.autograd.grad(own, [tap.logits_BSX for tap in student.router.values()], retain_graph=True)
        theirs = torch.autograd.grad(right, list(exact.values()), retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            assert b.abs().max() > 1e-3, name
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_fill_changes_nothing():
    batch = join_rows(make_rows(count=3, packed=False))
    student, teacher = taps_of(batch, seed=1), taps_of(batch, seed=2, layers=(1,))
    before = terms_of()(student, teacher, batch=batch, load_LX=shares())
    fill = batch.attention_mask_BS == 0
    assert fill.any()
    for tap in (*student.router.values(), *teacher.router.values()):
        tap.logits_BSX[fill] = 50.0
        tap.choice_BSK[fill] = 3
    after = terms_of()(student, teacher, batch=batch, load_LX=shares())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    student.router[0].logits_BSX[0, 0] += 1
    assert not torch.equal(terms_of()(student, teacher, batch=batch, load_LX=shares())[0], after[0])


def test_a_batch_of_fill_alone_gives_zero():
    batch = make_rows(count=1, packed=False)[0]
    empty = type(batch)(**{**vars(batch), "segments": ((),)})
    student, teacher = taps_of(empty, seed=1, grad=True), taps_of(empty, seed=2, layers=(1,))
    sums, figures = terms_of()(student, teacher, batch=empty, load_LX=shares())
    assert torch.equal(sums, torch.zeros(3))
    assert torch.equal(figures, torch.zeros_like(figures))
    sums.sum().backward()
    assert all(torch.equal(tap.logits_BSX.grad, torch.zeros_like(tap.logits_BSX)) for tap in student.router.values())


def test_sums_and_figures_of_parts_add_up():
    rows = make_rows(count=4, packed=True)
    whole = join_rows(rows)
    student, teacher = taps_of(whole, seed=1), taps_of(whole, seed=2, layers=(1,))

    def part(taps, start, end):
        return Taps(
            router={n: RouterTap(t.logits_BSX[start:end], t.choice_BSK[start:end]) for n, t in taps.router.items()}
        )

    wanted = terms_of()(student, teacher, batch=whole, load_LX=shares())
    found = [
        terms_of()(part(student, a, b), part(teacher, a, b), batch=join_rows(rows[a:b]), load_LX=shares())
        for a, b in itertools.pairwise((0, 1, 4))
    ]
    for place in range(2):
        total = found[0][place] + found[1][place]
        torch.testing.assert_close(total, wanted[place], rtol=1e-6, atol=1e-9)


def test_balance_is_one_for_equal_loads_and_has_then_no_gradient():
    batch = join_rows(make_rows(count=2, packed=True))
    student = taps_of(batch, seed=1, grad=True)
    equal = torch.full((len(LAYERS), X), 1 / X)
    sums, _ = terms_of(("load_balance",), pairs=())(student, None, batch=batch, load_LX=equal)
    used = sum(segment.length for row in batch.segments for segment in row)
    assert sums.item() == pytest.approx(used, rel=1e-6)
    sums.sum().backward()
    assert all(tap.logits_BSX.grad.abs().max() < 1e-6 for tap in student.router.values())


def test_squares_are_those_of_each_terms_gradient():
    batch = join_rows(make_rows(count=2, packed=True))
    student, teacher = taps_of(batch, seed=1, grad=True), taps_of(batch, seed=2, layers=(1,))
    squares = torch.zeros(3)
    sums, _ = terms_of()(student, teacher, batch=batch, load_LX=shares(), squares_N=squares)
    (sums * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    plain, _ = terms_of()(student, teacher, batch=batch, load_LX=shares())
    for place, factor in enumerate((1.0, 2.0, 3.0)):
        logits = [tap.logits_BSX for tap in student.router.values()]
        gradients = torch.autograd.grad(plain[place], logits, retain_graph=True)
        wanted = sum(float((factor * gradient).square().sum()) for gradient in gradients)
        assert float(squares[place]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("expert_map", "student", "teacher", "groups"),
    [
        ((0, 0, 1, -1), 2, 4, [([0], [0, 1]), ([1], [2])]),  # a larger teacher, one expert of it left out
        ((0, 1, 0, 1, -1), 5, 2, [([0, 2], [0]), ([1, 3], [1])]),  # a larger student
        ((2, 0, 1), 3, 3, [([0], [1]), ([1], [2]), ([2], [0])]),  # other places
        ((2, 2, -1, 0), 3, 4, [([0], [3]), ([2], [0, 1])]),  # student expert 1 has no counterpart
    ],
)
def test_expert_map_compares_groups_of_experts(expert_map, student, teacher, groups):
    compared, sides = expert_places(expert_map, student=student, teacher=teacher)
    assert compared == len(groups)
    generator = torch.Generator().manual_seed(3)
    for place, (side, count) in enumerate((("student", student), ("teacher", teacher))):
        logits = torch.randn((5, count), generator=generator).requires_grad_()
        log_p = mapped(log_routing(logits, scoring="softmax"), sides[f"{side}_X"], count=compared)
        sums = torch.stack([logits.exp()[:, group[place]].sum(-1) for group in groups], dim=-1)
        wanted = (sums / sums.sum(-1, keepdim=True)).log()
        torch.testing.assert_close(log_p, wanted)
        factor = torch.randn((5, compared), generator=generator)
        (mine,) = torch.autograd.grad((log_p * factor).sum(), logits, retain_graph=True)
        (theirs,) = torch.autograd.grad((wanted * factor).sum(), logits)
        torch.testing.assert_close(mine, theirs)


def test_a_teacher_with_the_students_routing_has_no_divergence_and_full_overlap():
    batch = join_rows(make_rows(count=2, packed=True))
    student = taps_of(batch, seed=1)
    teacher = Taps(router={1: student.router[0]})
    terms = terms_of(("router_kl",), pairs=[RouterPair(LayerPair(0, 1), compared=X)])
    sums, figures = terms(student, teacher, batch=batch, load_LX=shares())
    assert float(sums) == pytest.approx(0.0, abs=1e-4)
    loads = RouterLoads(terms, device=torch.device("cpu"))
    loads.learn(figures, reduce=torch.clone)
    assert loads.figures()["router/overlap"] == 1.0


def test_figures_by_hand():
    batch = make_rows(count=1, packed=True)[0]
    used = batch.segments[0][0].length
    logits = torch.zeros((1, batch.input_ids_BS.shape[1], 4))
    choice = torch.tensor([0, 1]).expand(1, batch.input_ids_BS.shape[1], 2)
    other = torch.tensor([0, 2]).expand(1, batch.input_ids_BS.shape[1], 2)
    terms = RouterTerms(terms=("router_kl",), layers=(3,), experts=4, pairs=[RouterPair(LayerPair(3, 5), compared=4)])
    tapped = Taps(router={3: RouterTap(logits, choice)})
    sums, figures = terms(
        tapped, Taps(router={5: RouterTap(logits, other)}), batch=batch, load_LX=torch.full((1, 4), 0.25)
    )
    loads = RouterLoads(terms, device=torch.device("cpu"))
    assert loads.figures() == {}
    loads.learn(figures, reduce=lambda total: 2 * total)
    assert torch.equal(loads.share_LX, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert torch.equal(loads.heat_map(), torch.tensor([[2.0, 2.0, 0.0, 0.0]]))
    found = loads.figures()
    assert found["router/max_load"] == found["router/max_load/layer_3"] == 2.0
    assert found["router/dead_frac"] == 0.5
    assert found["router/entropy"] == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
    assert found["router/overlap"] == found["router/overlap/layers_3_5"] == 0.5
    assert float(sums) == 0.0 and used > 0 and loads.figures() == {}
    # A step without a position keeps the load, and a restored object goes on from it.
    loads.learn(torch.zeros_like(figures), reduce=torch.clone)
    other_loads = RouterLoads(terms, device=torch.device("cpu"))
    other_loads.restore(loads.state())
    assert torch.equal(other_loads.share_LX, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def test_the_plan_asks_for_the_routers_of_both():
    plan = terms_of().extend(AlignmentPlan())
    assert plan.student.router == LAYERS and plan.teacher.router == (1,)
    assert terms_of(("router_z",)).extend(AlignmentPlan()).teacher.router == ()
