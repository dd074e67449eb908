"""How far the gradient of sparse teacher signals is from that of the whole distribution, on real models.

    python tools/signal_bias.py [--teacher FOLDER] [--text FILE.jsonl] [--layers N] [--tokens N] [--top-k 8 64 256]

The student is the teacher's first layers with its final norm and head. Both read the same text; forward KL at
temperature 1 and its gradients of the student's last hidden states and of its head are taken from the whole
distribution, from the likeliest ids in all three readings, and from drawn ids. Printed is a markdown table of relative
L2 errors ‖g − g_full‖ / ‖g_full‖. An error that the mean over several sets of draws does not have is noise, not bias.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from largekd.contracts import (
    Batch,
    Distribution,
    HiddenSignal,
    SampledRequest,
    TopKRequest,
    VocabularyHead,
)
from largekd.objectives.divergences import forward_kl
from largekd.objectives.readings import SparseKind
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass
from largekd.teachers.readout import Readout

KINDS: tuple[SparseKind, ...] = ("tail", "renormalise", "drop")


@dataclass(frozen=True)
class Pair:
    """Last hidden states (1, tokens, width) of both models on the same tokens and their heads (ids, width), float32."""

    teacher_BSE: Tensor
    teacher_weight_VE: Tensor
    student_BSD: Tensor
    student_weight_VD: Tensor

    @property
    def tokens(self) -> int:
        return self.student_BSD.shape[1]

    @property
    def head(self) -> VocabularyHead:
        return VocabularyHead(self.teacher_weight_VE, self.teacher_weight_VE.shape[0])


@dataclass(frozen=True)
class Outcome:
    """Mean value per token, and the gradients of it."""

    value: float
    hidden: Tensor
    weight: Tensor

    def errors(self, full: "Outcome") -> tuple[float, float]:
        """Relative L2 distances of both gradients from the whole distribution's."""
        return _relative(self.hidden, full.hidden), _relative(self.weight, full.weight)


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    signal: str
    value: float
    hidden_error: float
    head_error: float
    mean_hidden_error: float | None = None
    mean_head_error: float | None = None


def _relative(own: Tensor, other: Tensor) -> float:
    return float((own - other).norm() / other.norm())


def outcome(pair: Pair, *, signal: Distribution, kind: SparseKind = "tail") -> Outcome:
    """Forward KL through the vocabulary pass, as training computes it."""
    student = [tensor.detach().requires_grad_() for tensor in (pair.student_BSD, pair.student_weight_VD)]
    labels_BS = torch.zeros(1, pair.tokens, dtype=torch.int64)
    batch = Batch(labels_BS, labels_BS, torch.ones(1, pair.tokens), torch.arange(pair.tokens))
    vocabulary = VocabularyPass(terms=(VocabularyTerm("forward_kl", forward_kl),), chunk_tokens=256, sparse=kind)
    loss = vocabulary(
        *student,
        vocab_size=pair.student_weight_VD.shape[0],
        batch=batch,
        signal=signal,
        scales=torch.full((1,), 1.0 / pair.tokens),
    )["loss"]
    hidden, weight = torch.autograd.grad(loss, student)
    return Outcome(loss.item(), hidden, weight)


def lines_of(pair: Pair, *, top_k: Sequence[int], draws: Sequence[int], repeats: int) -> list[Line]:
    """The table's rows; drawn ids are drawn `repeats` times, and the first set is also shown alone."""
    full = outcome(pair, signal=HiddenSignal(pair.teacher_BSE, pair.head))
    lines = [Line("whole distribution", full.value, 0.0, 0.0)]
    readout, rows_T = Readout(pair.teacher_BSE[0], pair.head, pair.head.vocab_size), torch.arange(pair.tokens)
    for k in top_k:
        signal = readout.top_k(rows_T, request=TopKRequest(k=k))
        found = {kind: outcome(pair, signal=signal, kind=kind) for kind in KINDS}
        lines += [Line(f"top {k}, {kind}", one.value, *one.errors(full)) for kind, one in found.items()]
    for count in draws:
        signals = (readout.sampled(rows_T, request=SampledRequest(count, seed=seed)) for seed in range(repeats))
        first, mean = _first_and_mean(pair, signals=list(signals))
        lines.append(Line(f"{count} draws", mean.value, *first.errors(full), *mean.errors(full)))
    return lines


def _first_and_mean(pair: Pair, *, signals: Sequence[Distribution]) -> tuple[Outcome, Outcome]:
    first = outcome(pair, signal=signals[0])
    value, hidden, weight = first.value, first.hidden.clone(), first.weight.clone()
    for signal in signals[1:]:
        one = outcome(pair, signal=signal)
        value, hidden, weight = value + one.value, hidden.add_(one.hidden), weight.add_(one.weight)
    number = len(signals)
    return first, Outcome(value / number, hidden / number, weight / number)


def table(lines: Sequence[Line], *, repeats: int) -> str:
    """Markdown."""
    text = [
        f"| signal | forward KL (nats) | error, hidden states | error, head | mean of {repeats}: hidden | head |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        errors = (line.hidden_error, line.head_error, line.mean_hidden_error, line.mean_head_error)
        cells = ["" if error is None else f"{100 * error:.2f} %" for error in errors]
        text.append(" | ".join([f"| {line.signal}", f"{line.value:.4f}", *cells]) + " |")
    return "\n".join(text)


def load_pair(folder: Path, *, text: str, layers: int, tokens: int) -> Pair:
    """Hidden states of the model in `folder` and of its first `layers` layers on the first `tokens` tokens of text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids_BS = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :tokens]
    if ids_BS.shape[1] < tokens:
        raise SystemExit(f"--tokens {tokens}: the text has {ids_BS.shape[1]} tokens only; give a longer --text")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    depth = len(model.model.layers)
    if not 0 < layers < depth:
        raise SystemExit(f"--layers {layers}: the teacher has {depth} layers; choose 1 to {depth - 1}")
    with torch.no_grad():
        teacher_BSE = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
        student_BSD = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
    weight = model.lm_head.weight.detach()
    return Pair(teacher_BSE, weight, student_BSD, weight.clone())


def read_text(path: Path, *, characters: int) -> str:
    """The first records of a JSON-lines file, whatever text their fields hold, joined."""
    parts: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            parts += [value for value in json.loads(line).values() if isinstance(value, str)]
            if sum(map(len, parts)) >= characters:
                break
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("assets/smollm2-135m-instruct"), help="a Llama's folder")
    parser.add_argument("--text", type=Path, default=Path("assets/math/eval.jsonl"), help="records with text")
    parser.add_argument("--layers", type=int, default=29, help="layers that the student keeps (default 29)")
    parser.add_argument("--tokens", type=int, default=384, help="tokens of text (default 384)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 64, 256], help="numbers of likeliest ids")
    parser.add_argument("--draws", type=int, nargs="+", default=[12, 50], help="numbers of drawn ids")
    parser.add_argument("--repeats", type=int, default=16, help="sets of draws that are averaged (default 16)")
    options = parser.parse_args(arguments)
    text = read_text(options.text, characters=20 * options.tokens)
    pair = load_pair(options.teacher, text=text, layers=options.layers, tokens=options.tokens)
    lines = lines_of(pair, top_k=options.top_k, draws=options.draws, repeats=options.repeats)
    print(f"{options.teacher.name}, its first {options.layers} layers as student, {pair.tokens} tokens\n")
    print(table(lines, repeats=options.repeats))
    print(f"\nNoise of a mean falls with the root of its sets: {1 / math.sqrt(options.repeats):.2f} of one set's.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
