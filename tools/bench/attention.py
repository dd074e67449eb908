"""Memory and time of attention alignment against the eager way, which stores the maps of the aligned layers.

python tools/bench/attention.py [--quick] [--rounds N] [--loss NAME] [--query-block N] [--json FILE]

Every measurement is a process of its own; the contenders take turns. Exit status 1: a bar was missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from vocab_cell import measure  # noqa: E402

from largekd.config.alignment import AttentionConfig  # noqa: E402
from largekd.contracts import IGNORE_LABEL, AttentionInputs, Batch, Segment  # noqa: E402
from largekd.models.taps import AttentionShape  # noqa: E402
from largekd.objectives.attention import AttentionTerm  # noqa: E402
from largekd.objectives.attention_maps import AttentionLayout  # noqa: E402

MEMORY_BAR = 0.25
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Cell:
    """One row of `tokens` in bf16; both models have `heads` query heads of width 64 and 2 key heads."""

    tokens: int = 2048
    layers: int = 4
    heads: int = 14
    loss: str = "kl"
    query_block: int = 128

    @property
    def stored_bytes(self) -> int:
        """The maps of both models in float32."""
        return 2 * self.layers * self.heads * self.tokens**2 * 4

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(heads=self.heads, key_heads=2, head_width=64)


Layers = dict[int, AttentionInputs]


def make_layers(cell: Cell, /, *, seed: int, wanted: bool) -> Layers:
    """Normal queries, keys and values of each layer; `wanted`: they want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> Tensor:
        values = torch.randn(1, heads, cell.tokens, cell.shape.head_width, generator=generator)
        return values.to(torch.bfloat16).requires_grad_(wanted)

    shape, scale = cell.shape, cell.shape.head_width**-0.5
    return {
        layer: AttentionInputs(normal(shape.heads), normal(shape.key_heads), normal(shape.key_heads), scale=scale)
        for layer in range(cell.layers)
    }


def make_batch(tokens: int, /) -> Batch:
    """One row that one sample fills."""
    zeros_BS = torch.zeros(1, tokens, dtype=torch.long)
    return Batch(
        input_ids_BS=zeros_BS,
        labels_BS=torch.full_like(zeros_BS, IGNORE_LABEL),
        token_weight_BS=torch.zeros(1, tokens),
        counted_T=torch.zeros(0, dtype=torch.long),
        segments=((Segment(0, 0, tokens),),),
        segment_BS=torch.ones_like(zeros_BS),
    )


def ours(cell: Cell, student: Layers, teacher: Layers) -> float:
    """The term, forward and backward."""
    pairs = [(layer, layer) for layer in range(cell.layers)]
    config = AttentionConfig.model_validate({"loss": cell.loss, "query_block": cell.query_block})
    term = AttentionTerm(config, pairs=pairs, student=cell.shape, teacher=cell.shape)
    total = term(student, teacher, layout=AttentionLayout.of(make_batch(cell.tokens)), pairs=pairs)
    total.backward()
    return float(total.detach())


def eager(cell: Cell, student: Layers, teacher: Layers) -> float:
    """What `output_attentions` leads to: all maps of both models are stored, then compared one layer after another."""
    with torch.no_grad():
        theirs = [_map(teacher[layer]) for layer in range(cell.layers)]
    mine = [_map(student[layer]) for layer in range(cell.layers)]
    total = torch.zeros(())
    for s, t in zip(mine, theirs, strict=True):
        if cell.loss == "kl":
            rows = torch.nn.functional.kl_div(s.clamp_min(1e-38).log(), t, reduction="sum")
        else:
            rows = (1 - torch.nn.functional.cosine_similarity(s, t, dim=-1)).sum()
            rows = 2 * rows if cell.loss == "mse" else rows
        total = total + rows / cell.heads / cell.layers
    total.backward()
    return float(total.detach())


def _map(inputs: AttentionInputs, /) -> Tensor:
    query, key = inputs.query_BHSd.float(), inputs.key_BGSd.float()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    tokens = query.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return torch.softmax((query * inputs.scale @ key.transpose(-1, -2)).masked_fill(hidden, float("-inf")), dim=-1)


CONTENDERS: dict[str, Callable[[Cell, Layers, Layers], float]] = {"ours": ours, "eager": eager}


def child(cell: Cell, name: str, /) -> dict[str, float]:
    """One measurement in this process, after a small one that loads libraries."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for at in (replace(cell, tokens=64), cell):
        student, teacher = make_layers(at, seed=0, wanted=True), make_layers(at, seed=1, wanted=False)
        found = measure(lambda at=at, s=student, t=teacher: CONTENDERS[name](at, s, t))  # type: ignore[misc]
    return found


def spawn(cell: Cell, name: str, /) -> dict[str, float]:
    """The figures that a process of this file prints."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    payload = json.dumps({"cell": asdict(cell), "name": name})
    command = [sys.executable, str(Path(__file__).resolve()), "--child", payload]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{payload} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, judge the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, one round; memory is not judged")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--loss", choices=("kl", "cosine", "mse"), default="kl")
    parser.add_argument("--query-block", type=int, default=Cell.query_block)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        payload: dict[str, Any] = json.loads(options.child)
        print(json.dumps(child(Cell(**payload["cell"]), payload["name"])))
        return 0
    cell = Cell(loss=options.loss, query_block=options.query_block, tokens=512 if options.quick else Cell.tokens)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(1 if options.quick else options.rounds):
        for name, found in runs.items():
            found.append(spawn(cell, name))
    return report(cell, runs, judged=not options.quick, path=options.json)


def report(cell: Cell, runs: dict[str, list[dict[str, float]]], /, *, judged: bool, path: Path | None) -> int:
    """Prints medians and ratios; 1 if a bar was missed."""
    figures = {
        name: {field: statistics.median(run[field] for run in found) for field in ("cpu_s", "peak_bytes", "loss")}
        for name, found in runs.items()
    }
    print(
        f"{cell.layers} layers, {cell.tokens} tokens, {cell.heads} heads, {cell.loss}, {cell.query_block} queries a "
        f"block, 1 thread; both models' maps in fp32: {cell.stored_bytes / 1e6:.0f} MB"
    )
    print(f"{'':8} {'CPU-s':>8} {'ratio':>7} {'peak MB':>9} {'ratio':>7} {'of stored':>10}")
    for name, found in figures.items():
        cpu, peak = (found[field] / figures["ours"][field] for field in ("cpu_s", "peak_bytes"))
        stored = found["peak_bytes"] / cell.stored_bytes
        print(
            f"{name:8} {found['cpu_s']:8.2f} {cpu:6.2f}x {found['peak_bytes'] / 1e6:9.1f} {peak:6.2f}x {stored:10.3f}"
        )
    difference = abs(figures["ours"]["loss"] / figures["eager"]["loss"] - 1)
    share = figures["ours"]["peak_bytes"] / cell.stored_bytes
    bars = {f"losses agree to {AGREEMENT:g}: {difference:.1e}": difference <= AGREEMENT}
    if judged:
        bars[f"extra peak below {MEMORY_BAR} of the stored maps: {share:.3f}"] = share < MEMORY_BAR
    for text, held in bars.items():
        print(f"{text}  {'ok' if held else 'MISSED'}")
    if path:
        path.write_text(json.dumps({"cell": asdict(cell), "runs": runs}, indent=1) + "\n")
    return int(not all(bars.values()))


if __name__ == "__main__":
    sys.exit(main())
