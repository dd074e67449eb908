"""Compare the kinds of teacher on one pair of models: seconds per step, memory per rank, bytes on disk.

    python tools/compare_teachers.py                             all kinds, two ranks
    python tools/compare_teachers.py --kinds online,cached_top_k
    python tools/compare_teachers.py --table

Every kind runs its own recipe of the quick start's pair for a few steps on the first records of the data. Rows are
appended to runs/compare_teachers/rows.jsonl; the same command goes on where it stopped. Exit status: 0 all rows are
there, 1 a run failed, 2 an error to mend.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx2 as httpx
from ablation import Run, append_row, discard_weights, free_port, is_finished, launch, read_rows, row_of

from largekd.config.render import render_config
from largekd.errors import ConfigError, LargeKDError
from largekd.runtime.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "compare_teachers"
ROWS = "rows.jsonl"
TEACHER = "assets/smollm2-135m-instruct"
START_S = 300.0

SETTINGS = (
    "train.max_steps=8",
    "optim.warmup_steps=2",
    "data.train.max_samples=300",
    "data.eval.max_samples=40",
    "eval.before=false",
    "eval.max_rows=8",
    "checkpoint.every_steps=0",
    "log.every_steps=1",
    "log.health_every_steps=0",
    "log.tensorboard=false",
    "log.progress=false",
)
_MEMBER = {"model": TEACHER, "deepspeed": "ds_configs/teacher_zero3.json"}
_TWO = json.dumps([{"name": name, "teacher": _MEMBER} for name in ("first", "second")])
_CODECS = {"cached_top_k": '{"kind": "top_k", "k": 64}', "cached_hidden": '{"kind": "hidden"}'}
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "none (cross-entropy)": ("recipes/quickstart.yaml", ("objective.alpha=0",)),
    "online": ("recipes/quickstart.yaml", ()),
    "cached_top_k": ("recipes/cached.yaml", ()),
    "cached_hidden": ("recipes/cached.yaml", ('objective.signal={"kind": "full"}',)),
    "remote": ("recipes/remote.yaml", ()),
    "mixture": ("recipes/mixture.yaml", (f"teacher.members={_TWO}",)),
    "ema": ("recipes/ema.yaml", ()),
    "self_shared": ("recipes/self_shared.yaml", ()),
}


def main(argv: list[str]) -> int:
    """Read the command line, do the kinds that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of a run (default: 2)")
    parser.add_argument("--table", action="store_true", help="print the table of the rows so far, and run nothing")
    given = parser.parse_args(argv)
    chosen = given.kinds.split(",")
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown:
        parser.error(f"--kinds: there is no {unknown[0]!r}; known are {', '.join(KINDS)}")
    try:
        done = [_row_exists(kind, ranks=given.ranks) for kind in chosen] if not given.table else []
        sys.stdout.write(table(read_rows(RUNS / ROWS)) + "\n")
    except (LargeKDError, OSError) as error:
        sys.stderr.write(f"compare_teachers: {error}\n")
        return 2
    return 0 if all(done) else 1


def _row_exists(kind: str, *, ranks: int) -> bool:
    """Do the kind's run and write its row unless it is there. Errors: LargeKDError, OSError."""
    if any(row["variant"] == kind for row in read_rows(RUNS / ROWS)):
        return True
    folder = RUNS / kind.split(" ")[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    base, own = KINDS[kind]
    stored = _store(kind, base=base, folder=folder, ranks=ranks) if kind in _CODECS else None
    if stored is not None:
        own = (*own, f"teacher={json.dumps({'kind': 'cached', 'path': str(stored), 'model': TEACHER})}")
    with _server(folder) if kind == "remote" else nullcontext(None) as address:
        if address is not None:
            own = (*own, f"teacher.servers={json.dumps([address])}")
        run = Run(variant=kind, seed=0, folder=folder, base=base, overrides=(*SETTINGS, *own), ranks=ranks)
        recipe, log = (folder.with_name(f"{folder.name}.{ending}") for ending in ("yaml", "log"))
        atomic_write(recipe, data=render_config(run.config()).encode())
        sys.stderr.write(f"{kind}: see {log}\n")
        status = launch(recipe, ranks, log)
        if not is_finished(run):
            sys.stderr.write(f"{kind}: not finished (exit status {status})\n")
            return False
    row = row_of(run)
    if stored is not None:
        manifest = json.loads((stored / "manifest.json").read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in stored.rglob("*.safetensors"))
        row |= {
            "stored_bytes": size,
            "stored_tokens": sum(shard["tokens"] for shards in manifest["shards"].values() for shard in shards),
        }
    append_row(RUNS / ROWS, row=row)
    discard_weights(run)
    return True


def _store(kind: str, *, base: str, folder: Path, ranks: int) -> Path:
    """Make the cache that the kind reads; its folder. Errors: ConfigError when the job failed."""
    target = folder.with_name(f"{folder.name}_cache")
    # Small files, so that the ranks share the few samples out.
    own = (f"cache.path={json.dumps(str(target))}", f"cache.codec={_CODECS[kind]}", "cache.shard_samples=32")
    settings = (*SETTINGS, *own)
    run = Run(
        variant=kind, seed=0, folder=folder.with_name(f"{folder.name}_job"), base=base, overrides=settings, ranks=1
    )
    recipe, log = (folder.with_name(f"{folder.name}_cache.{ending}") for ending in ("yaml", "log"))
    atomic_write(recipe, data=render_config(run.config()).encode())
    status = launch(recipe, ranks, log, script="cache_teacher")
    if not (target / "manifest.json").is_file():
        raise ConfigError(f"{kind}: the cache was not made (exit status {status}); see {log}.")
    return target


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """The address of a teacher that serves in a process of its own. Errors: ConfigError when it does not come up."""
    address, log = f"http://127.0.0.1:{free_port()}", folder.with_name("server.log")
    command = [sys.executable, str(ROOT / "launch/serve_teacher.py"), "--config", str(ROOT / "recipes/quickstart.yaml")]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--port", address.rpartition(":")[2]], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline_s = time.monotonic() + START_S
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise ConfigError(f"the teacher's server did not come up; see {log}.")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line per kind."""
    lines = ["| teacher | s per step | of online | peak memory of a rank, GB | on disk |", "|---|---|---|---|---|"]
    online = next((row["step_s"] for row in rows if row["variant"] == "online"), None)
    for row in rows:
        ratio = "–" if online is None else f"{row['step_s'] / online:.2f}"
        disk = "–"
        if "stored_bytes" in row:
            disk = f"{row['stored_bytes'] / row['stored_tokens']:,.0f} B a token"
        lines.append(
            f"| {row['variant']} | {row['step_s']:.2f} | {ratio} | {row['peak_rss_bytes'] / 1e9:.2f} | {disk} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
