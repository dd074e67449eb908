"""Show how temperature, alpha, the weights of all terms and the learning rate will change, before a run.

    python tools/plot_schedules.py recipes/quickstart.yaml
    python tools/plot_schedules.py recipes/quickstart.yaml --table objective.alpha="{start: 0.5, end: 1}"

The loss is 1-alpha times the cross-entropy, plus for each divergence its factor alpha * temperature^2 * weight, plus
for each alignment term its weight. The picture needs matplotlib, the table does not. Exit status 2: an error to mend.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from largekd.config.load import load_config
from largekd.config.objective_checks import term_name
from largekd.config.run import RunConfig
from largekd.config.schedule import CurveConfig
from largekd.config.staging import stage_named
from largekd.errors import ConfigError, LargeKDError
from largekd.objectives.schedules import value_at
from largekd.optim.schedule import learning_rate

Columns = Mapping[str, Sequence[float]]

POINTS = 1000  # of a curve in the picture
ROWS = 21  # of the table
PANELS_IN_A_ROW = 4


def main(argv: list[str]) -> int:
    """Read the recipe, print the table or draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    parser.add_argument("--stage", metavar="NAME", help="of a run in stages, the one to show; the first if not given")
    parser.add_argument("--steps", type=int, metavar="N", help="length of the run; train.max_steps if not given")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the picture; runs/<recipe>-schedules.png if not given"
    )
    parser.add_argument("--table", action="store_true", help="print a table; a picture only if --out is given too")
    given = parser.parse_intermixed_args(argv)
    try:
        config = stage_named(load_config(given.recipe, overrides=given.overrides), name=given.stage).config
        max_steps = length(config, steps=given.steps)
        if given.table:
            steps = some_steps(max_steps, at_most=ROWS)
            sys.stdout.write(table(columns(config, steps=steps, max_steps=max_steps), steps=steps) + "\n")
        if given.out or not given.table:
            steps = some_steps(max_steps, at_most=POINTS)
            target = given.out or Path("runs") / f"{Path(given.recipe).stem}-schedules.png"
            draw(columns(config, steps=steps, max_steps=max_steps), steps=steps, target=target)
            sys.stderr.write(f"{target}\n")
    except LargeKDError as error:
        sys.stderr.write(f"plot_schedules: {error}\n")
        return 2
    return 0


def length(config: RunConfig, *, steps: int | None) -> int:
    """Optimizer steps of the run. Errors: ConfigError when they depend on the data."""
    found = steps if steps is not None else config.train.max_steps
    if found is None:
        raise ConfigError("train.max_steps is not set, so that the length depends on the data; give it with --steps N.")
    if found < 1:
        raise ConfigError(f"--steps {found}: must be at least 1.")
    return found


def some_steps(max_steps: int, *, at_most: int) -> list[int]:
    """The first step, the last, and as many between them as are wanted, at equal distances."""
    count = min(max_steps, at_most)
    return sorted({round(index * (max_steps - 1) / max(count - 1, 1)) for index in range(count)})


def columns(config: RunConfig, *, steps: Sequence[int], max_steps: int) -> dict[str, list[float]]:
    """What changes over the run, by name, at these steps (0 is the first)."""
    objective = config.objective

    def over(value: float | CurveConfig) -> list[float]:
        return [value_at(value, step=step, max_steps=max_steps) for step in steps]

    temperature, alpha = over(objective.temperature), over(objective.alpha)
    found = {"temperature": temperature, "alpha": alpha, "1-alpha": [1.0 - share for share in alpha]}
    for term in objective.divergences:
        weights = over(term.weight)
        found[f"weight/{term_name(term)}"] = weights
        found[f"factor/{term_name(term)}"] = [
            share * degree**2 * weight for share, degree, weight in zip(alpha, temperature, weights, strict=True)
        ]
    for aligned in (*objective.features, *objective.attention):
        found[f"weight/{aligned.name}"] = over(aligned.weight)
    found["learning rate"] = [learning_rate(step=step, max_steps=max_steps, config=config.optim) for step in steps]
    return found


def table(values: Columns, *, steps: Sequence[int]) -> str:
    """Aligned text, one line per step; steps are counted from 1, as in a run's records."""
    cells = [["step", *values]]
    for index, step in enumerate(steps):
        cells.append([f"{step + 1:,}", *(f"{column[index]:.4g}" for column in values.values())])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def draw(values: Columns, *, steps: Sequence[int], target: Path) -> None:
    """One small panel per column, in a PNG. Errors: ConfigError without matplotlib, or where nothing can be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the picture needs matplotlib, which is not installed: pip install -c constraints.txt '.[plots]'; "
            "--table prints the numbers without it."
        )
    # The classes alone, not pyplot: no display is looked for and no state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(PANELS_IN_A_ROW, len(values))
    down = math.ceil(len(values) / across)
    figure = Figure(figsize=(3.2 * across, 2.2 * down), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    places = [step + 1 for step in steps]
    for index, (name, column) in enumerate(values.items()):
        panel = figure.add_subplot(down, across, index + 1)
        panel.plot(places, column, linewidth=1.2, marker="." if len(places) == 1 else None)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(visible=True, alpha=0.3)
        # A constant is a line in the middle, and differences in its rounding are not blown up.
        low, high = min(column), max(column)
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
        panel.set_ylim(low - margin, high + margin)
    figure.supxlabel("optimizer step", fontsize=8)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_png(target)
    except OSError as error:
        raise ConfigError(f"--out {target}: cannot be written ({error.strerror or error}).") from error


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
