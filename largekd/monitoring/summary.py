"""`summary.json`: what a run came to, and the same for a reader."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largekd.monitoring.json_records import finite_or_none, replaced_file

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class EvalFigures:
    """One evaluation on held-out text.

    kl: KL(teacher‖student), nats per token; None for the teacher itself, and where it is of another teacher.
    """

    perplexity: float
    kl: float | None = None

    def as_mapping(self) -> dict[str, float | None]:
        """The JSON object; a non-finite figure is null."""
        figures = {"perplexity": finite_or_none(self.perplexity)}
        if self.kl is not None:
            figures["kl"] = finite_or_none(self.kl)
        return figures


@dataclass(frozen=True)
class RunSummary:
    """The figures of a finished (or stopped) run.

    tokens: label tokens over all ranks; tokens_per_s: over the wall time of training steps; wall_s: of the whole run,
    over its resumptions; peak_rss_bytes: one per rank. `before`, `after` are evaluations of the student; an evaluation
    that did not take place is None, and so is a folder that was not written. note: why figures are left out that
    would not be comparable.
    """

    steps: int
    tokens: int
    skipped_steps: int
    wall_s: float
    tokens_per_s: float
    peak_rss_bytes: Sequence[int]
    before: EvalFigures | None = None
    after: EvalFigures | None = None
    teacher: EvalFigures | None = None
    export_dir: str | None = None
    tensorboard_dir: str | None = None
    note: str | None = None

    def as_mapping(self) -> dict[str, Any]:
        """The nested objects of summary.json."""
        evaluations = {"before": self.before, "after": self.after, "teacher": self.teacher}
        noted = {} if self.note is None else {"note": self.note}
        return noted | {
            "eval": {name: figures.as_mapping() if figures else None for name, figures in evaluations.items()},
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "tokens_per_s": finite_or_none(self.tokens_per_s),
            "wall_s": finite_or_none(self.wall_s),
            "peak_rss_bytes": list(self.peak_rss_bytes),
            "export_dir": self.export_dir,
            "tensorboard_dir": self.tensorboard_dir,
        }

    def write(self, path: Path) -> None:
        """Replaces `path` atomically. Raises LargeKDError when it cannot be written."""
        text = json.dumps(self.as_mapping(), indent=2, allow_nan=False, ensure_ascii=False)
        with replaced_file(path) as file:
            file.write((text + "\n").encode())


def render_summary(summary: Mapping[str, Any]) -> str:
    """A few lines for the terminal from the mapping of summary.json, with the commands to look at the results."""
    lines = [
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {_duration(summary['wall_s'])} "
        f"({_number(summary['tokens_per_s'], '{:,.0f}')} tokens/s)",
        "",
        f"{'held-out text':<20}{'perplexity':>12}{'KL to teacher (nats/token)':>30}",
    ]
    rows = (("student, before", "before"), ("student, after", "after"), ("teacher", "teacher"))
    students = [figures["perplexity"] for name in ("before", "after") if (figures := summary["eval"].get(name))]
    # Ids drawn from a teacher tell neither its perplexity nor a distance to it, and the student's own figure is there.
    missing = "not finite" if None in students else "not known"
    for label, key in rows:
        figures = summary["eval"].get(key)
        if figures:
            kl = _number(figures["kl"], "{:.4f}", missing=missing) if "kl" in figures else ""
            perplexity = _number(figures["perplexity"], "{:,.2f}", missing=missing)
            lines.append(f"{label:<20}{perplexity:>12}{kl:>30}".rstrip())
        else:
            lines.append(
                f"{label:<20}{'not comparable' if key == 'before' and 'note' in summary else 'not evaluated':>16}"
            )
    if "note" in summary:
        lines.append(summary["note"])
    peaks = ", ".join(f"{peak / 1e9:.2f} GB" for peak in summary["peak_rss_bytes"])
    lines += ["", f"{'peak memory':<14}{peaks} (one per rank)"]
    if summary["skipped_steps"]:
        lines.append(f"{'skipped':<14}{summary['skipped_steps']:,} steps with a non-finite gradient")
    return "\n".join(lines + _where(summary))


def _where(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    if summary["tensorboard_dir"]:
        lines.append(f"{'curves':<14}tensorboard --logdir {shlex.quote(summary['tensorboard_dir'])}")
    if summary["export_dir"]:
        folder = summary["export_dir"]
        lines += [
            f"{'student':<14}{folder}",
            f"{'  chat':<14}python tools/chat.py {shlex.quote(folder)}",
            f"{'  load':<14}transformers.AutoModelForCausalLM.from_pretrained({json.dumps(folder)})",
        ]
    return lines


def _number(value: float | None, form: str, *, missing: str = "not finite") -> str:
    return missing if value is None else form.format(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"
