"""Answers of a model with continuous batching against one at a time, with the same prompts and seeds.

    python tools/bench/generation.py --model assets/smollm2-135m-instruct --prompts assets/math-chat/train.jsonl
    python tools/bench/generation.py --batch-sizes 1 8 16 32 --answers 64 --max-new-tokens 128

Every size writes the same answers. `waves` is batching without replacement: a batch is written until its last answer
has ended, then the next. Times are of writing alone, without loading; the first answers of a size are not counted. The
processor seconds of this process tell more than seconds where other work runs beside it.
Texts that differ from those written one at a time are counted, and how many of them had a margin below 1e-4.
`--plain` also times transformers' own `generate` with the same prompts, in waves; its texts are other draws.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))
UNSURE = 1e-4


def main() -> None:
    """Parse, write with each size, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/smollm2-135m-instruct", metavar="FOLDER")
    parser.add_argument("--prompts", default="assets/math-chat/train.jsonl", metavar="FILE", help="chat records")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--answers", type=int, default=48, help="answers that each size writes")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--plain", action="store_true", help="also time transformers' own generate")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    if 1 not in given.batch_sizes:
        given.batch_sizes.insert(0, 1)
    result = measure(given)
    sys.stdout.write(table(result))
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Figures by batch size, and of waves of the largest one."""
    import torch
    import transformers

    prompts = [record["messages"][0]["content"] for record in _records(given.prompts, count=given.answers)]
    rows: list[dict[str, Any]] = []
    texts: dict[str, Any] = {}
    with ExitStack() as stack:
        backend, asks = _backend(given, questions=prompts, stack=stack)
        for size in sorted(given.batch_sizes):
            backend.resize(size)
            rows.append(_timed(backend, asks, name=f"batch {size}", texts=texts, first=not rows))
        largest = max(given.batch_sizes)
        waves = [asks[start : start + largest] for start in range(0, len(asks), largest)]
        rows.append(_timed(backend, *waves, name=f"waves of {largest}", texts=texts, first=False))
    if given.plain:
        rows += [_plain(given, asks, size=size) for size in sorted({1, largest})]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {name: value for name, value in vars(given).items() if name != "json"},
        "rows": rows,
    }


def _records(name: str, *, count: int) -> list[dict[str, Any]]:
    with open(name, encoding="utf-8") as stream:
        return [json.loads(line) for line, _ in zip(stream, range(count), strict=False)]


def _backend(given: argparse.Namespace, *, questions: list[str], stack: ExitStack) -> tuple[Any, list[Any]]:
    from contextlib import nullcontext

    from largekd.config.generate import EmbeddedBackendConfig, PromptConfig, SamplingConfig
    from largekd.curation.records import Item
    from largekd.factory.asks import Asker
    from largekd.factory.embedded import EmbeddedBackend
    from largekd.runtime.ranks import Ranks
    from largekd.sharding.cluster import process_group

    stack.enter_context(process_group(timeout_s=600))
    config = EmbeddedBackendConfig(
        model=given.model,
        deepspeed=str(CHECKOUT / "ds_configs/zero3_tiny.json"),
        precision=given.precision,
        gather="whole",
    )
    sampling = SamplingConfig(temperature=given.temperature, max_new_tokens=given.max_new_tokens)

    class Sized(EmbeddedBackend):
        """Whose batch size may change between two writes."""

        def resize(self, size: int) -> None:
            if self._writer is None:
                self._writer = self._load()
            self._writer.batch_size = size

    backend = Sized(config, sampling=sampling, folder=Path("bench"), ranks=Ranks(), first=nullcontext)
    stack.callback(backend.close)
    items = [Item(f"r{place}", question) for place, question in enumerate(questions)]
    asks = Asker(PromptConfig(), sampling).asks(items)
    return backend, sorted(asks, key=lambda ask: -len(ask.messages[0]["content"]))


def _timed(backend: Any, *waves: list[Any], name: str, texts: dict[str, Any], first: bool) -> dict[str, Any]:
    list(backend.write(iter(waves[0][:1]), stopping=lambda: False))
    start, busy = time.perf_counter(), time.process_time()
    written = [answer for wave in waves for answer in _all(backend, wave)]
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    if first:
        texts |= {answer.key: answer for answer in written}
    changed = [answer for answer in written if answer.text != texts[answer.key].text]
    return {
        "name": name,
        "answers": len(written),
        "tokens": sum(answer.written_tokens for answer in written),
        "seconds": seconds,
        "processor_s": busy,
        "tokens_per_s": sum(answer.written_tokens for answer in written) / seconds,
        "other_texts": len(changed),
        "of_these_unsure": sum((texts[answer.key].least_margin or 0.0) < UNSURE for answer in changed),
    }


def _plain(given: argparse.Namespace, asks: list[Any], *, size: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    dtype = torch.float32 if given.precision == "fp32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).eval()
    drawn = {"do_sample": True, "temperature": given.temperature, "top_k": 0, "top_p": 1.0}
    options = drawn if given.temperature > 0 else {"do_sample": False}
    torch.manual_seed(0)
    tokens, start, busy = 0, time.perf_counter(), time.process_time()
    for first in range(0, len(asks), size):
        chats = [list(ask.messages) for ask in asks[first : first + size]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        written = model.generate(**inputs, max_new_tokens=given.max_new_tokens, **options)
        answers = written[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id
        # The fill may be the end token: counted up to the first.
        tokens += int((answers.cumsum(-1) - answers.long() == 0).sum())
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {
        "name": f"transformers, {size}",
        "answers": len(asks),
        "tokens": tokens,
        "seconds": seconds,
        "processor_s": busy,
        "tokens_per_s": tokens / seconds,
        "other_texts": None,
        "of_these_unsure": None,
    }


def _all(backend: Any, asks: list[Any]) -> Iterator[Any]:
    yield from backend.write(iter(asks), stopping=lambda: False)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    base = result["rows"][0]["tokens_per_s"]
    lines = [
        f"{result['machine']}; torch {result['versions']['torch']}, transformers {result['versions']['transformers']}",
        "",
        "| | answers | tokens | seconds | processor s | tokens/s | gain | other texts (of these with margin < 1e-4) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['answers']} | {row['tokens']} | {row['seconds']:.1f} | {row['processor_s']:.1f} | "
        f"{row['tokens_per_s']:.1f} | {row['tokens_per_s'] / base:.2f} | {_others(row)} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def _others(row: dict[str, Any]) -> str:
    return "—" if row["other_texts"] is None else f"{row['other_texts']} ({row['of_these_unsure']})"


if __name__ == "__main__":
    main()
