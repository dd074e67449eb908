"""Check an exported student with plain transformers: the perplexity of the held-out samples of its run.

The samples are scored one by one, without packing, padding or DeepSpeed, and compared with the run's summary.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from largekd.config.load import load_config
from largekd.contracts import IGNORE_LABEL
from largekd.data.loader import evaluation_batches
from largekd.data.samples import load_samples
from largekd.errors import ConfigError, LargeKDError
from largekd.monitoring.health import perplexity
from largekd.runtime.files import read_json

TOLERANCE = 1e-3


def main(argv: list[str]) -> int:
    """0 when both perplexities agree, 1 when they differ, 2 when they cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run.dir of a finished run")
    given = parser.parse_args(argv)
    try:
        found, expected, tokens = check(given.run_dir)
    except LargeKDError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    difference = abs(found / expected - 1)
    verdict = "agrees with" if difference <= TOLERANCE else "DIFFERS FROM"
    sys.stdout.write(
        f"plain transformers: perplexity {found:.5f} over {tokens:,.0f} held-out tokens; "
        f"{verdict} the summary's {expected:.5f} (relative difference {difference:.1e}, allowed {TOLERANCE:.0e})\n"
    )
    return 0 if difference <= TOLERANCE else 1


def check(run_dir: Path) -> tuple[float, float, float]:
    """Perplexity of the export, that of the summary, and the number of tokens. Errors: ConfigError."""
    try:
        config = load_config(run_dir / "config.yaml")
        summary = read_json(run_dir / "summary.json")
    except OSError as error:
        raise ConfigError(f"{run_dir}: not a finished run ({error}).") from error
    after = summary["eval"]["after"]
    if after is None or config.data.eval is None:
        raise ConfigError(f"{run_dir}: the run had no held-out data (data.eval).")
    folder = summary["export_dir"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = load_samples(
        config.data.eval,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        sequence_length=config.train.sequence_length,
        vocab_size=model.config.vocab_size,
        key="data.eval",
    ).samples
    batches = evaluation_batches(
        samples,
        sequence_length=config.train.sequence_length,
        packing=config.data.packing,
        micro_batch_size=1,
        max_rows=config.eval.max_rows,
    )
    total = tokens = 0.0
    for batch in tqdm(batches, desc="held-out rows", disable=not sys.stderr.isatty()):
        for segment in batch.segments[0]:
            place = slice(segment.offset, segment.offset + segment.length)
            loss, count = _score(model, batch.input_ids_BS[0, place], batch.labels_BS[0, place])
            total, tokens = total + loss, tokens + count
    return perplexity(total / tokens), float(after["perplexity"]), tokens


def _score(model: PreTrainedModel, ids_S: torch.Tensor, labels_S: torch.Tensor) -> tuple[float, int]:
    with torch.no_grad():
        logits_SV = model(input_ids=ids_S[None]).logits[0].float()
    loss = torch.nn.functional.cross_entropy(logits_SV, labels_S, ignore_index=IGNORE_LABEL, reduction="sum")
    return float(loss), int((labels_S != IGNORE_LABEL).sum())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
