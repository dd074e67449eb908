"""Make reasoning problems with known answers: a training file and a held-out file that share no question.

    python tools/make_problems.py runs/problems/sums --family chain_sum:min_terms=3,max_terms=3,max_digits=2
    python tools/make_problems.py runs/problems/mixed --family chain_sum --family leg_counting --train 2000 --seed 7

The problems come from the package reasoning-gym (extra `problems`), which has about a hundred families; each takes its
own settings after a colon. FOLDER gets train.jsonl and eval.jsonl (`id`, `family`, `question`, `answer`) and
problems.json with the settings; it is replaced at once when all is done, and left alone when it was made with the same
settings. Several families are dealt in turn. Exit status: 0 the files are there, 2 an error to mend.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from largekd.errors import ConfigError, LargeKDError
from largekd.runtime.files import read_json, remove_tree, swap_into_place, temporary_sibling, write_json

SETTINGS_FILE = "problems.json"
# A family with few different questions gives up after so many repeated ones in a row.
REPEATED = 200


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, make the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--family", action="append", required=True, metavar="NAME[:KEY=VALUE,…]")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="training problems (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, metavar="N", help="held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        for name in ("train", "held_out"):
            if getattr(given, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(given, name)}: must be at least 1.")
        families = [read_family(text) for text in given.family]
        made = make(given.folder, families=families, train=given.train, held_out=given.held_out, seed=given.seed)
    except LargeKDError as error:
        sys.stderr.write(f"make_problems: {error}\n")
        return 2
    state = f"{given.train} problems for training, {given.held_out} held out" if made else "present"
    sys.stdout.write(f"{given.folder}: {state}\n")
    return 0


def read_family(text: str) -> tuple[str, dict[str, Any]]:
    """`name:key=value,key=value` as a name and its settings, whose values are YAML scalars. Errors: ConfigError."""
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--family {text}: {part!r} is no KEY=VALUE.")
        settings[key.strip()] = yaml.safe_load(value)
    return name, settings


def make(
    folder: Path, *, families: Sequence[tuple[str, Mapping[str, Any]]], train: int, held_out: int, seed: int
) -> bool:
    """Whether the files had to be made. Errors: ConfigError for families and settings that the package refuses."""
    settings = {
        "families": [[name, dict(own)] for name, own in families],
        "train": train,
        "held_out": held_out,
        "seed": seed,
        "package": f"reasoning-gym {_version()}",
    }
    try:
        if read_json(folder / SETTINGS_FILE) == settings:
            return False
    except (OSError, ValueError):
        pass
    if folder.exists() and any(folder.iterdir()) and not (folder / SETTINGS_FILE).exists():
        raise ConfigError(f"{folder}: holds other files; choose a folder of its own.")
    rows = list(_dealt(families, count=train + held_out, seed=seed))
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_sibling(folder, label=folder.name)
    new.mkdir()
    try:
        # The held-out ones come first: more training problems leave them as they are.
        for name, part in (("eval", rows[:held_out]), ("train", rows[held_out:])):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (new / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        write_json(new / SETTINGS_FILE, value=settings)
        former = swap_into_place(new, target=folder)
    finally:
        remove_tree(new)
    if former is not None:
        remove_tree(former)
    return True


def _version() -> str:
    _gym()
    return version("reasoning-gym")


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f'{error}: install the extra, `pip install -e ".[problems]" -c constraints.txt`.') from error
    return reasoning_gym


def _dealt(families: Sequence[tuple[str, Mapping[str, Any]]], *, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` different problems, of the families in turn. Errors: ConfigError."""
    streams = [_problems(name, settings=own, seed=seed, count=count) for name, own in families]
    known: set[str] = set()
    for place in range(count):
        name = families[place % len(streams)][0]
        for _ in range(REPEATED):
            question, answer = next(streams[place % len(streams)])
            if question not in known:
                break
        else:
            raise ConfigError(f"--family {name}: only {place} different problems are there, {count} are wanted.")
        known.add(question)
        digest = hashlib.sha256(question.encode()).hexdigest()[:16]
        yield {"id": f"{name}-{digest}", "family": name, "question": question, "answer": answer}


def _problems(name: str, *, settings: Mapping[str, Any], seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Questions and answers of a family without end; some may be repeated. Errors: ConfigError."""
    gym = _gym()
    while True:
        try:
            data = gym.create_dataset(name, seed=seed, size=count, **settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"--family {name} with {dict(settings)}: {error}") from error
        for problem in data:
            yield str(problem["question"]).strip(), str(problem["answer"]).strip()
        # Problem i of a data set is drawn from seed + i.
        seed += count


if __name__ == "__main__":
    raise SystemExit(main())
