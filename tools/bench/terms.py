"""What five terms in one vocabulary pass cost beside one: CPU time and peak memory, eager and compiled.

python tools/bench/terms.py [--quick] [--rounds N] [--json FILE]

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

CONTENDERS = ("one", "five", "one_compiled", "five_compiled")
LABELS = {
    "one": "forward KL",
    "five": "five terms",
    "one_compiled": "forward KL, compiled",
    "five_compiled": "five terms, compiled",
}
TIME, MEMORY = 1.5, 1.02
CHUNK_TOKENS = 512


def child(cell: Cell, name: str, /) -> dict[str, float]:
    """One measurement of one contender in this process, after a few tokens to warm up libraries and compilation."""
    from largekd.objectives import divergences
    from largekd.objectives.terms import VocabularyTerm
    from largekd.objectives.vocabulary import VocabularyPass

    five: dict[str, divergences.Divergence] = {
        "forward_kl": divergences.forward_kl,
        "reverse_kl": divergences.reverse_kl,
        "jsd": divergences.JSD(mix=0.5),
        "skewed_forward_kl": divergences.SkewedForwardKL(skew=0.1),
        "total_variation": divergences.total_variation,
    }
    count = 5 if name.startswith("five") else 1
    terms = tuple(VocabularyTerm(term, function) for term, function in list(five.items())[:count])
    compiles = name.endswith("compiled")
    vocabulary = VocabularyPass(terms=terms, chunk_tokens=CHUNK_TOKENS, compile=compiles)
    inputs = make_inputs(cell)
    warm = inputs.first(min(cell.tokens, 17))
    _step(vocabulary, replace(cell, tokens=warm.labels_T.numel()), warm)
    inputs.hidden_TD.grad = inputs.weight_VD.grad = None
    found = measure(lambda: _step(vocabulary, cell, inputs))
    assert vocabulary.rows.compiles == compiles, "the row function was not compiled"
    return found


def _step(vocabulary: Any, cell: Cell, inputs: Inputs, /) -> float:
    import torch

    from largekd.contracts import Batch, HiddenSignal, VocabularyHead

    tokens, terms = inputs.labels_T.numel(), len(vocabulary.terms)
    labels_BS = inputs.labels_T[None]
    loss = vocabulary(
        inputs.hidden_TD[None],
        inputs.weight_VD,
        vocab_size=cell.vocab,
        batch=Batch(labels_BS, labels_BS, torch.ones(1, tokens), torch.arange(tokens)),
        signal=HiddenSignal(inputs.teacher_hidden_TE[None], VocabularyHead(inputs.teacher_weight_VE, cell.vocab)),
        scales=torch.full((terms,), 1 / tokens),
    )["loss"]
    loss.backward()
    return loss.item()


def judge(runs: dict[str, list[dict[str, float]]], /, *, counts: bool) -> list[dict[str, str]]:
    """Medians over rounds of the ratio within a round. Without `counts` (a small cell) nothing is judged."""
    bars = []
    for suffix in ("", "_compiled"):
        for field, what, limit in (("cpu_s", "CPU time", TIME), ("peak_bytes", "memory", MEMORY)):
            pairs = zip(runs[f"five{suffix}"], runs[f"one{suffix}"], strict=True)
            found = median(five[field] / one[field] for five, one in pairs)
            verdict = ("passed" if found <= limit else "MISSED") if counts else "not judged"
            text = f"{what}, five terms / one{suffix.replace('_', ', ')}"
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
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    rounds = 1 if options.quick else options.rounds
    for turn in range(rounds):
        for name in CONTENDERS:
            print(f"{LABELS[name]}, round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
            runs[name].append(spawn(Path(__file__), cell, name))
    report = {"environment": environment(), "cell": asdict(cell), "runs": runs}
    report["bars"] = judge(runs, counts=not options.quick)
    print(f"\n{cell.tokens} tokens, vocabulary {cell.vocab}, hidden {cell.hidden}, {cell.dtype}, one thread")
    for name in CONTENDERS:
        cpu, peak = (median(run[field] for run in runs[name]) for field in ("cpu_s", "peak_bytes"))
        print(f"{LABELS[name]:24} {cpu:8.2f} CPU-s {peak / 1e6:9.1f} MB")
    for bar in report["bars"]:
        print(f"{bar['text']:42} {bar['found']:>8}  must {bar['must']:>8}  {bar['verdict']}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(bar["verdict"] == "MISSED" for bar in report["bars"]))


if __name__ == "__main__":
    sys.exit(main())
