"""The report of a curation: one HTML page, and one picture."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from largekd.curation.records import Curated
from largekd.curation.statistics import RATE_BINS, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
PICTURE_FILE = "report.png"
_LENGTH_BINS = 30
_EXAMPLE_CHARACTERS = 4000


def write_report(
    folder: Path, *, statistics: Statistics, rules: Sequence[str], summary: Mapping[str, Any], title: str
) -> list[str]:
    """Writes the page and, where matplotlib is installed, the picture; returns the names of the files.

    Whatever a model wrote is escaped.
    """
    has_picture = find_spec("matplotlib") is not None
    if has_picture:
        _draw(folder / PICTURE_FILE, statistics=statistics, rules=rules)
    else:
        logger.warning("the report has no picture: matplotlib is not installed (largekd[factory])")
    environment = Environment(
        loader=PackageLoader("largekd.curation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        picture=PICTURE_FILE if has_picture else None,
        funnel=_shares(statistics.funnel(rules)),
        summary=summary,
        filters={name: value for name, value in summary["filters"].items() if value},
        kept=[_example(row) for row in statistics.examples_kept],
        dropped={rule: list(map(_example, rows)) for rule, rows in sorted(statistics.examples_dropped.items())},
    )
    (folder / REPORT_FILE).write_bytes(page.encode("utf-8", errors="replace"))
    return [REPORT_FILE, *([PICTURE_FILE] if has_picture else [])]


def _shares(funnel: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Each step with what it took, and the share of all answers that is left."""
    written = max(1, funnel[0][1])
    before = [left for _, left in funnel[:1]] + [left for _, left in funnel[:-1]]
    return [
        {"rule": rule, "left": left, "dropped": former - left, "share": left / written}
        for (rule, left), former in zip(funnel, before, strict=True)
    ]


def _example(row: Curated) -> dict[str, Any]:
    return {
        "question": row.ask.messages[-1]["content"][:_EXAMPLE_CHARACTERS],
        "text": row.written.text[:_EXAMPLE_CHARACTERS],
        "right": row.ask.item.answer,
        "found": row.parsed.answer,
        "about": f"row {row.ask.item.id}, template {row.ask.template}, sample {row.ask.sample}: {row.verdict.outcome}",
        "note": row.note,
        "scores": {name: f"{value:.4g}" for name, value in row.scores.items()},
    }


def _draw(path: Path, *, statistics: Statistics, rules: Sequence[str]) -> None:
    """Funnel, lengths, pass rates and templates. Without pyplot: it keeps figures, and asks for a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)
    _draw_funnel(top_left, statistics=statistics, rules=rules)
    _draw_lengths(top_right, statistics=statistics)
    edges = [place / RATE_BINS for place in range(RATE_BINS)]
    heights = [statistics.pass_rates[place] for place in range(RATE_BINS)]
    low_left.bar(edges, heights, width=0.9 / RATE_BINS, align="edge")
    low_left.set_xlim(0, 1)
    low_left.set_ylim(0, max(1, *heights) * 1.05)
    low_left.set(title="rows by pass rate", xlabel="share of verified answers that are right", ylabel="rows")
    names = sorted(statistics.templates)
    places = list(range(len(names)))
    low_right.barh(places, [statistics.templates[name] for name in names], color="0.85", label="written")
    low_right.barh(places, [statistics.templates_kept[name] for name in names], label="kept")
    low_right.set_yticks(places, [name[:40] for name in names], parse_math=False)
    low_right.set(title="templates", xlabel="answers")
    low_right.legend()
    # Without the version of the library the same figures give the same bytes for longer.
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw_funnel(axes: "Axes", *, statistics: Statistics, rules: Sequence[str]) -> None:
    funnel = statistics.funnel(rules)
    places = list(range(len(funnel)))
    bars = axes.barh(places, [left for _, left in funnel])
    axes.bar_label(bars, padding=2)
    axes.set_yticks(places, [rule for rule, _ in funnel], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title="answers left after each rule", xlabel="answers")


def _draw_lengths(axes: "Axes", *, statistics: Statistics) -> None:
    longest = max([1, *statistics.tokens_kept, *statistics.tokens_dropped])
    edges = [longest * place / _LENGTH_BINS for place in range(_LENGTH_BINS + 1)]
    counters = {"kept": statistics.tokens_kept, "dropped": statistics.tokens_dropped}
    axes.hist(
        [list(counter) for counter in counters.values()],
        weights=[list(counter.values()) for counter in counters.values()],
        bins=edges,
        stacked=True,
        label=list(counters),
        color=["C0", "0.8"],
    )
    axes.legend()
    axes.set(title="lengths", xlabel="tokens of an answer", ylabel="answers")
