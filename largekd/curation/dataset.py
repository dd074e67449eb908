"""Answers that are kept as records of training data."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from largekd.config.curation import DatasetConfig
from largekd.curation.examination import Span
from largekd.curation.records import Curated, Message, Parsed

SpansOf = Callable[[Parsed, str], list[Span]]
_ANSWER_MARK = "{answer}"
_PARQUET_ROWS = 4096
# Halves of surrogate pairs are no characters: tokenizers and parquet refuse them. As many characters stay, for spans.
_HALF = re.compile("[\ud800-\udfff]")


def targets(row: Curated, *, reasoning: str, answer_text: str, spans_of: SpansOf) -> Iterator[tuple[str, list[Span]]]:
    """The text that a student learns, with its spans: `reasoning` is with (as it was written) or without it (the
    answer alone, or the program where there is no answer; nothing where there is neither)."""
    if reasoning == "with":
        text = row.written.text
        yield text, spans_of(row.parsed, text)
    elif row.parsed.answer is not None:
        start = answer_text.index(_ANSWER_MARK)
        text = answer_text.replace(_ANSWER_MARK, row.parsed.answer, 1)
        yield text, [Span(name="answer", start=start, end=start + len(row.parsed.answer))]
    elif row.parsed.program is not None:
        fence = "```python\n"
        program = row.parsed.program.rstrip("\n")
        yield f"{fence}{program}\n```", [Span(name="program", start=len(fence), end=len(fence) + len(program))]


def without_target(row: Curated, *, config: DatasetConfig) -> Curated:
    """The row, dropped where it should be learnt without reasoning and has neither answer nor program."""
    if row.dropped_by is None and config.reasoning == "without" and row.parsed.answer is row.parsed.program is None:
        return replace(row, dropped_by="no_answer", note="dataset.reasoning = without")
    return row


def records(row: Curated, *, config: DatasetConfig, spans_of: SpansOf) -> Iterator[dict[str, Any]]:
    """The training records of one answer: one, or two with `reasoning: both`."""
    for reasoning in ("with", "without") if config.reasoning == "both" else (config.reasoning,):
        for text, spans in targets(row, reasoning=reasoning, answer_text=config.answer_text, spans_of=spans_of):
            hint = config.answer_hint if reasoning == "without" else ""
            shown = _prompt(row, config=config, hint=hint)
            prompt = [_message(**message, learnt=config.learn == "all") for message in shown]
            yield {
                "messages": [*prompt, _message(role="assistant", content=text, learnt=True)],
                "spans": list(spans),
                "id": row.ask.item.id,
                "key": row.written.key,
                "template": row.ask.template,
                "sample": row.ask.sample,
                "reasoning": reasoning == "with",
                "outcome": row.verdict.outcome,
                "answer": row.ask.item.answer,
                "scores": dict(row.scores),
            }


def _message(*, role: str, content: str, learnt: bool) -> dict[str, Any]:
    weight = {} if learnt or role != "assistant" else {"weight": 0}
    return {"role": role, "content": _HALF.sub("\ufffd", content), **weight}


def _prompt(row: Curated, *, config: DatasetConfig, hint: str) -> list[Message]:
    if config.prompt == "question":
        messages = [message for message in row.ask.messages[:1] if message["role"] == "system"]
        messages.append({"role": "user", "content": row.ask.item.question})
    else:
        messages = [dict(message) for message in row.ask.messages]
    if hint:
        messages[-1]["content"] += hint
    return messages


def json_line(value: Any) -> bytes:
    """One line of JSON lines; half surrogate pairs become escapes, as JSON allows."""
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", errors="backslashreplace")


def write_parquet(path: Path, *, lines: Path, scores: Sequence[str]) -> None:
    """The records of a JSON-lines file as parquet; `scores`: every name of a score, null where a record has none."""
    text, span = pa.string(), pa.struct([("name", pa.string()), ("start", pa.int64()), ("end", pa.int64())])
    message = [("role", text), ("content", text)]
    with lines.open("rb") as stream:
        # Quotes inside of texts are escaped: this is a key.
        message += [("weight", pa.int64())] if any(b'"weight": 0' in line for line in stream) else []
    columns = [
        ("messages", pa.list_(pa.struct(message))),
        ("spans", pa.list_(span)),
        *((name, text) for name in ("id", "key", "template")),
        ("sample", pa.int64()),
        ("reasoning", pa.bool_()),
        ("outcome", text),
        ("answer", text),
    ]
    if scores:
        columns.append(("scores", pa.struct([(name, pa.float64()) for name in scores])))
    schema = pa.schema(columns)
    with pq.ParquetWriter(path, schema) as writer, lines.open("rb") as stream:
        rows: list[dict[str, Any]] = []
        for line in stream:
            rows.append(json.loads(line))
            if len(rows) == _PARQUET_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
