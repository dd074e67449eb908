"""Terms of the user's own: in the pass against the same terms with hand-derived gradients, and loading."""

import functools
from pathlib import Path

import pytest
import torch
from sparse_reference import (
    gradients,
    run_pass,
    same,
    student_logits64,
    teacher_logits64,
    terms_of,
    with_counted,
)
from torch import Tensor
from vocabulary_reference import VOCAB, make_case

from largekd.config.objective import ObjectiveConfig
from largekd.errors import ConfigError
from largekd.objectives import compiled
from largekd.objectives.plugins import PluginTerm, TermRows, load_plugins
from largekd.objectives.selection import SelectionRule, bounded
from largekd.objectives.terms import VocabularyTerm, build_objective

HUBER = Path(__file__).resolve().parents[2] / "recipes" / "plugins" / "huber.py"


def own_forward_kl(rows: TermRows, *, factor: float = 1.0) -> Tensor:
    logp, logq = rows.teacher_logits_RV.log_softmax(-1), rows.student_logits_RV.log_softmax(-1)
    return factor * (logp.exp() * (logp - logq)).sum(-1)


def own_cross_entropy(rows: TermRows) -> Tensor:
    return torch.nn.functional.cross_entropy(rows.student_logits_RV, rows.labels_R, reduction="none")


def plugin(function=own_forward_kl, **options: object) -> VocabularyTerm:
    return VocabularyTerm("mine", PluginTerm(function, tuple(sorted(options.items()))))


@pytest.mark.parametrize("chunk", [1, 7, 41])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"teacher_vocab": VOCAB - 30}, {"bias": True, "scale": 2.0, "softcap": 4.0, "padded_rows": 3}],
    ids=str,
)
def test_autograd_equals_the_hand_derived_gradient(options, temperature, chunk) -> None:
    case = make_case(dtype=torch.float64, **options)
    arguments = {"signal": case.signal, "temperature": temperature}
    found = run_pass(case, terms=[plugin()], chunk=chunk, **arguments)
    expected = run_pass(case, terms=terms_of("forward_kl"), **arguments)
    torch.testing.assert_close(found["sums"], expected["sums"])
    same(case, found["loss"], expected["loss"], value=1e-10, slope=1e-10)


def test_beside_other_terms_and_a_selection() -> None:
    case = make_case(dtype=torch.float64)
    scales = [0.5, 0.3, 2.0, 0.7]
    names = ("cross_entropy", "forward_kl", "forward_kl", "jsd")
    own, theirs = list(terms_of(*names)), terms_of(*names)
    own[2] = plugin(factor=1.0)
    arguments = {"signal": case.signal, "scales": scales, "temperature": 2.0, "measure": True}
    arguments |= {"selection": SelectionRule("gap", True), "limit": bounded(torch.tensor(7 / 3))}
    found, expected = (run_pass(case, terms=terms, **arguments) for terms in (own, theirs))
    assert 0 < expected["kept"].item() < case.batch.token_weight_BS.flatten()[case.batch.counted_T].sum()
    for name in ("sums", "health", "kept"):
        torch.testing.assert_close(found[name], expected[name])
    same(case, found["loss"], expected["loss"], value=1e-10, slope=1e-10)


def test_options_and_labels_reach_the_function() -> None:
    case = make_case(dtype=torch.float64)
    found = run_pass(case, terms=[plugin(factor=3.0), plugin(own_cross_entropy)], signal=case.signal)
    expected = run_pass(case, terms=terms_of("forward_kl", "cross_entropy"), signal=case.signal, scales=[3.0, 1.0])
    same(case, found["loss"], expected["loss"], value=1e-6, slope=1e-9)


def test_half_precision_and_two_threads() -> None:
    case = make_case(dtype=torch.bfloat16)
    arguments = {"signal": case.signal, "temperature": 2.0}
    expected = run_pass(case, terms=terms_of("forward_kl"), **arguments)
    torch.set_num_threads(2)
    try:
        found = run_pass(case, terms=[plugin()], chunk=41, **arguments)
    finally:
        torch.set_num_threads(1)
    same(case, found["loss"], expected["loss"], value=1e-3, slope=2**-7)


def test_micro_batches_add_up_and_gradients_off_give_values() -> None:
    case = make_case(dtype=torch.float64)
    whole = run_pass(case, terms=[plugin()], signal=case.signal)
    tokens = torch.arange(case.batch.counted_T.numel())
    parts = [
        run_pass(case, terms=[plugin()], signal=case.signal, batch=with_counted(case, part))
        for part in (tokens[:4], tokens[4:])
    ]
    same(case, parts[0]["loss"] + parts[1]["loss"], whole["loss"], value=1e-10, slope=1e-10)
    with torch.no_grad():
        off = run_pass(case, terms=[plugin()], signal=case.signal)
    assert not off["loss"].requires_grad
    torch.testing.assert_close(off["sums"], whole["sums"])


def test_is_never_compiled(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("a plan with a user's term was compiled")

    monkeypatch.setattr(compiled.torch, "compile", refuse)
    case = make_case()
    found = run_pass(case, terms=[*terms_of("jsd"), plugin()], signal=case.signal, compile=True)
    assert torch.isfinite(found["loss"])
    with pytest.raises(AssertionError, match="was compiled"):
        run_pass(case, terms=terms_of("jsd"), signal=case.signal, compile=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda rows: rows.student_logits_RV, r"'<lambda>' returned the shape \(\d+, 401\) for \d+ rows; .* per row"),
        (lambda rows: rows.student_logits_RV.sum(), r"returned the shape \(\)"),
        (lambda rows: 0.5, "returned float; a term returns a tensor"),
        (lambda rows: rows.student_logits_RV.detach().sum(-1), "do not depend on student_logits_RV"),
        (functools.partial(lambda rows: rows.teacher_logits_RV[:, :2]), "returned the shape"),
    ],
)
def test_wrong_results_name_the_term(function, message) -> None:
    case = make_case()
    with pytest.raises(ConfigError, match=message):
        run_pass(case, terms=[plugin(function)], signal=case.signal)


# The example


@pytest.mark.parametrize("delta", [0.5, 1.0, 1e6])
def test_the_example_equals_its_formula(delta) -> None:
    case = make_case(dtype=torch.float64)
    config = {"divergences": [{"name": "plugin", "term": "huber", "options": {"delta": delta}}], "alpha": 1.0}
    objective = build_objective(ObjectiveConfig.model_validate(config), plugins=load_plugins([str(HUBER)]))
    assert [summand.metric for summand in objective.summands] == ["kd/huber"]
    found = run_pass(case, terms=objective.vocabulary, signal=case.signal, temperature=2.0)
    logp, logq = ((z / 2.0).log_softmax(-1) for z in (teacher_logits64(case), student_logits64(case)))
    x = (logq - logp).abs()
    h = torch.where(x <= delta, 0.5 * x * x, delta * (x - 0.5 * delta))
    weight = case.batch.token_weight_BS.flatten()[case.batch.counted_T].double()
    same(case, found["loss"], (weight * (logp.exp() * h).sum(-1)).sum(), value=1e-10, slope=1e-10)


def test_the_example_survives_ruled_out_ids() -> None:
    case = make_case(bias=True)
    with torch.no_grad():
        case.bias_V[[0, 7]] = float("-inf")
    found = run_pass(case, terms=[plugin(load_plugins([str(HUBER)])["huber"])], signal=case.signal)
    assert torch.isfinite(found["loss"]) and all(torch.isfinite(g).all() for g in gradients(case, found["loss"]))


# Loading


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_files_and_dotted_names(tmp_path, monkeypatch) -> None:
    text = (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nTERMS = {{{!r}: lambda rows: A(1)}}\n"
    )
    file = written(tmp_path, "one.py", "from __future__ import annotations\n" + text.format("a"))
    written(tmp_path, "dotted_plugin.py", text.format("b"))
    monkeypatch.syspath_prepend(str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    same_stem = written(other, "one.py", "VALUE = 5\ndef c(rows):\n    return VALUE\nTERMS = {'c': c}\n")
    found = load_plugins([file, "dotted_plugin", same_stem])
    assert list(found) == ["a", "b", "c"]
    assert found["a"](None).x == 1 and found["c"](None) == 5
    assert load_plugins([]) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X = 1\n", "has no TERMS, a dictionary"),
        ("TERMS = ['a']\n", "has no TERMS, a dictionary"),
        ("TERMS = {'a': 1}\n", "has no TERMS, a dictionary"),
        ("def broken(:\n", r"cannot be imported \(SyntaxError"),
        ("import nothing_of_that_name\n", r"cannot be imported \(ModuleNotFoundError: .*nothing_of_that_name"),
        ("raise RuntimeError('mine')\n", r"cannot be imported \(RuntimeError: mine\)"),
    ],
)
def test_bad_modules_are_named(tmp_path, text, message) -> None:
    path = written(tmp_path, "bad.py", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_plugins([path])
    assert str(caught.value).startswith("plugins: ") and "bad.py" in str(caught.value)


def test_missing_modules_and_clashes(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"plugins: 'no\.such\.module' cannot be imported .*dotted module name"):
        load_plugins(["no.such.module"])
    with pytest.raises(ConfigError, match=r"nowhere\.py' cannot be imported \(FileNotFoundError"):
        load_plugins([str(tmp_path / "nowhere.py")])
    first = written(tmp_path, "first.py", "TERMS = {'mine': min}\n")
    second = written(tmp_path, "second.py", "TERMS = {'mine': max}\n")
    with pytest.raises(ConfigError, match=r"two modules name a term 'mine'; rename the one in .*second\.py"):
        load_plugins([first, second])


def test_a_term_that_no_module_has_lists_those_there_are() -> None:
    config = ObjectiveConfig.model_validate({"divergences": [{"name": "plugin", "term": "hubert"}]})
    with pytest.raises(ConfigError, match="'hubert' is in none of the modules of `plugins`; they have huber"):
        build_objective(config, plugins=load_plugins([str(HUBER)]))
