"""Make training data anew from the answers of a generation job, with other settings and without generating again.

python tools/curate.py JOB_FOLDER [curation.KEY=VALUE ...] [--config FILE]

JOB_FOLDER is output.dir of launch/generate.py. Settings are those of the job (its job.json), or of FILE, with the given
keys replaced, such as curation.verify.kind=numeric. Verdicts of the configured judge that the folder holds count;
nothing is judged anew. The folder `data` in it is replaced at once when all is done.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if importlib.util.find_spec("largekd") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from largekd.config.generate import GenerateConfig

SECTION = "curation."


def main(arguments: list[str] | None = None) -> int:
    """0 when the data are made, 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output.dir of the job")
    parser.add_argument("overrides", nargs="*", metavar="curation.KEY=VALUE", help="replaces a setting")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a recipe whose `curation` and `judge` are used")
    options = parser.parse_intermixed_args(arguments)
    from largekd.curation.pipeline import DATA_FOLDER, tell
    from largekd.errors import LargeKDError
    from largekd.factory.judged_data import curate_job

    try:
        config = settings(options.folder, recipe=options.config, overrides=options.overrides)
        summary = curate_job(options.folder, config=config.curation, judge=config.judge)
    except LargeKDError as error:
        sys.stderr.write(f"curate.py: {error}\n")
        return 2
    sys.stdout.write(f"{options.folder / DATA_FOLDER}: {tell(summary)}\n")
    return 0


def settings(folder: Path, *, recipe: Path | None, overrides: list[str]) -> "GenerateConfig":
    """The recipe, or else what the job was, with overrides. Errors: ConfigError, DataError."""
    from largekd.config.generate import GenerateConfig
    from largekd.config.load import load_record, parse_record
    from largekd.config.render import render_config
    from largekd.errors import ConfigError

    other = [override for override in overrides if not override.startswith(SECTION)]
    if other:
        raise ConfigError(f"override {other[0]!r}: the answers are written; only keys of `curation` can change now.")
    if recipe is not None:
        return load_record(GenerateConfig, path=recipe, overrides=overrides)
    job = parse_record(GenerateConfig, mapping=job_config(folder))
    with tempfile.TemporaryDirectory() as scratch:
        # Written out as a recipe, so that overrides mean what they mean there.
        path = Path(scratch) / "job.yaml"
        path.write_text(render_config(job), encoding="utf-8")
        return load_record(GenerateConfig, path=path, overrides=overrides)


def job_config(folder: Path) -> dict[str, object]:
    """The job's configuration in its job.json. Errors: DataError."""
    from largekd.errors import DataError
    from largekd.runtime.files import read_json

    path = folder / "job.json"
    try:
        config = read_json(path)["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no configuration of a job ({error}); name a recipe with --config.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: no configuration of a job; name a recipe with --config.")
    return config


if __name__ == "__main__":
    raise SystemExit(main())
