"""What a mixture of two teachers costs beside one teacher in the vocabulary pass: CPU time and peak memory.

python tools/bench/teachers.py [--quick] [--rounds N] [--json FILE]

Every measurement is a process of its own; the contenders take turns. Exit status 1: a bar was missed.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from fused_vocab import NAMED, QUICK, environment  # noqa: E402
from vocab_bars import median  # noqa: E402
from vocab_cell import Cell, Inputs, make_inputs, measure, spawn  # noqa: E402

LABELS = {
    "one": "one teacher",
    "fixed": "two, fixed weights",
    "confidence": "two, by confidence",
    "learned": "two, learned weights",
    "one_compiled": "one teacher, compiled",
    "fixed_compiled": "two, fixed weights, compiled",
    "full": "two, full logits in the models' dtype",
}
CHUNK_TOKENS = 512
TIME = 2.0
"""Two teachers cost less than two passes."""
BUFFERS = 1.1
"""A second teacher adds one buffer of projections to the peak, and little else."""


def child(cell: Cell, name: str, /) -> dict[str, float]:
    """One measurement of one contender in this process, after a few tokens to warm up libraries and compilation."""
    from largekd.objectives.divergences import forward_kl
    from largekd.objectives.terms import VocabularyTerm
    from largekd.objectives.vocabulary import VocabularyPass

    compiles = name.endswith("compiled")
    term = VocabularyTerm("forward_kl", forward_kl)
    vocabulary = VocabularyPass(terms=(term,), chunk_tokens=CHUNK_TOKENS, compile=compiles)
    inputs, other = make_inputs(cell), make_inputs(cell, seed=1)
    step = _full_logits if name == "full" else _step
    kind = name.removesuffix("_compiled")
    warm = inputs.first(min(cell.tokens, 17)), other.first(min(cell.tokens, 17))
    step(vocabulary, replace(cell, tokens=warm[0].labels_T.numel()), *warm, kind=kind)
    inputs.hidden_TD.grad = inputs.weight_VD.grad = None
    found = measure(lambda: step(vocabulary, cell, inputs, other, kind=kind))
    assert vocabulary.rows.compiles == compiles, "the row function was not compiled"
    return found


def _step(vocabulary: Any, cell: Cell, inputs: Inputs, other: Inputs, /, *, kind: str) -> float:
    import torch

    from largekd.contracts import Batch, HiddenSignal, MixtureSignal, VocabularyHead

    tokens, labels_BS = inputs.labels_T.numel(), inputs.labels_T[None]
    members = tuple(
        HiddenSignal(side.teacher_hidden_TE[None], VocabularyHead(side.teacher_weight_VE, cell.vocab))
        for side in (inputs, other)
    )
    mixture = MixtureSignal(
        members,
        log_weight_M=torch.tensor([0.7, 0.3]).log(),
        confidence_scale=1.0 if kind == "confidence" else None,
        learned=kind == "learned",
    )
    loss = vocabulary(
        inputs.hidden_TD[None],
        inputs.weight_VD,
        vocab_size=cell.vocab,
        batch=Batch(labels_BS, labels_BS, torch.ones(1, tokens), torch.arange(tokens)),
        signal=members[0] if kind == "one" else mixture,
        scales=torch.full((1,), 1 / tokens),
    )["loss"]
    loss.backward()
    return float(loss.item())


def _full_logits(_: Any, cell: Cell, inputs: Inputs, other: Inputs, /, *, kind: str) -> float:
    """What a plain loop does with fixed weights."""
    import torch

    with torch.no_grad():
        sides = zip((0.7, 0.3), (inputs, other), strict=True)
        p_TV = sum(share * (side.teacher_hidden_TE @ side.teacher_weight_VE.t()).softmax(-1) for share, side in sides)
    logq_TV = (inputs.hidden_TD @ inputs.weight_VD.t()).log_softmax(-1)
    loss = torch.nn.functional.kl_div(logq_TV, p_TV, reduction="sum") / inputs.labels_T.numel()
    loss.backward()
    return float(loss.item())


def judge(runs: dict[str, list[dict[str, float]]], cell: Cell, /, *, counts: bool) -> list[dict[str, str]]:
    """Medians over rounds of what a second teacher adds within a round. Without `counts` (a small cell) no verdicts."""
    buffer_bytes = min(CHUNK_TOKENS, cell.tokens) * cell.vocab * cell.bytes_per_number
    bars = []
    for name, one in (("fixed", "one"), ("confidence", "one"), ("learned", "one"), ("fixed_compiled", "one_compiled")):
        pairs = list(zip(runs[name], runs[one], strict=True))
        time = median(two["cpu_s"] / alone["cpu_s"] for two, alone in pairs)
        more = median((two["peak_bytes"] - alone["peak_bytes"]) / buffer_bytes for two, alone in pairs)
        for what, found, limit in ((f"CPU time / {LABELS[one]}", time, TIME), ("more memory, buffers", more, BUFFERS)):
            verdict = ("passed" if found <= limit else "MISSED") if counts else "not judged"
            text = f"{LABELS[name]}: {what}"
            bars.append({"text": text, "found": f"{found:.3f}", "must": f"<= {limit}", "verdict": verdict})
    return bars


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, judge the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small cell, one round; nothing is judged")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        import torch

        torch.set_num_threads(1)
        payload = json.loads(options.child)
        print(json.dumps(child(Cell(**payload["cell"]), payload["name"])))
        return 0
    cell = QUICK if options.quick else NAMED
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LABELS}
    rounds = 1 if options.quick else options.rounds
    for turn in range(rounds):
        for name, label in LABELS.items():
            print(f"{label}, round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
            runs[name].append(spawn(Path(__file__), cell, name))
    report = {"environment": environment(), "cell": asdict(cell), "runs": runs}
    report["bars"] = judge(runs, cell, counts=not options.quick)
    print(f"\n{cell.tokens} tokens, vocabulary {cell.vocab}, hidden {cell.hidden}, {cell.dtype}, one thread")
    for name, label in LABELS.items():
        cpu, peak = (median(run[field] for run in runs[name]) for field in ("cpu_s", "peak_bytes"))
        print(f"{label:40} {cpu:8.2f} CPU-s {peak / 1e6:9.1f} MB")
    for bar in report["bars"]:
        print(f"{bar['text']:70} {bar['found']:>8}  must {bar['must']:>8}  {bar['verdict']}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(bar["verdict"] == "MISSED" for bar in report["bars"]))


if __name__ == "__main__":
    sys.exit(main())
