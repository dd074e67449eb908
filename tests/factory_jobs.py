"""Generation jobs for tests: a writer that needs no model, and ranks in processes of their own that can be killed."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from tiny_run import ROOT, changed, free_port

from largekd.curation.records import Ask, Written


class ScriptedBackend:
    """Writes a text that is a function of the ask, `pause_s` after it was taken; several at a time, out of order."""

    only_main = False

    def __init__(self, *, pause_s: float = 0.0, at_once: int = 3, fail_on: str | None = None) -> None:
        self._pause_s, self._at_once, self._fail_on = pause_s, at_once, fail_on
        self.asked: list[str] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "scripted"}

    def write(self, asks: Iterator[Ask], *, stopping: Callable[[], bool]) -> Iterator[Written]:
        while not stopping():
            batch = [ask for _, ask in zip(range(self._at_once), asks, strict=False)]
            if not batch:
                return
            self.asked += [ask.key for ask in batch]
            time.sleep(self._pause_s)
            for ask in reversed(batch):
                yield self._written(ask)

    def _written(self, ask: Ask) -> Written:
        said = ask.messages[-1]["content"]
        if self._fail_on is not None and self._fail_on in said:
            return Written(ask.key, "", "failed", 1, 0, failure="asked to fail")
        text = f"{ask.template} {len(ask.messages)} {hashlib.sha256(f'{ask.seed} {said}'.encode()).hexdigest()[:8]}"
        return Written(ask.key, text, "stop", len(said), 4)

    def show(self, ask: Ask) -> str:
        return ask.messages[-1]["content"]

    def count(self, ask: Ask) -> int:
        return len(self.show(ask))

    def close(self) -> None:
        pass


def job_settings(folder: Path, *, rows: int = 5, **changes: Any) -> dict[str, Any]:
    """The nested mapping of a job over `rows` questions in a file of its own; `changes` as in tiny_run.settings."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "rows.jsonl"
    lines = [json.dumps({"id": f"r{n}", "question": f"What is {n} and {n}?{' Why?' * (n % 7)}"}) for n in range(rows)]
    source.write_text("\n".join(lines) + "\n")
    tree = {
        "output": {"dir": str(folder / "job"), "shard_rows": 4},
        "source": {"path": str(source), "id": "id"},
        "backend": {"model": "unused", "deepspeed": "unused"},
        "prompts": {"templates": ["direct", "step_by_step"]},
        "sampling": {"samples": 2, "max_new_tokens": 8},
        "collective_timeout_s": 60,
        "log": {"progress": False},
    }
    return changed(tree, **changes)


def run_job(tree: Mapping[str, Any], *, backend: Any) -> bool:
    """The job in this process, with the process group that there is."""
    from largekd.config.generate import GenerateConfig
    from largekd.config.load import parse_record
    from largekd.factory.asks import Asker
    from largekd.factory.identity import claim, identity_of
    from largekd.factory.job import Job
    from largekd.factory.plan import plan
    from largekd.runtime.ranks import Together, current_ranks
    from largekd.runtime.shutdown import StopSignal

    config = parse_record(GenerateConfig, mapping=tree)
    folder, ranks = Path(config.output.dir), current_ranks()
    asker = Asker(config.prompts, config.sampling)
    with closing(backend), StopSignal() as stop:
        with Together():
            if ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                claim(folder, config=config, identity=identity_of(config, asker=asker, writer=backend.identity))
        job = Job(config=config, folder=folder, backend=backend, ranks=ranks, stop=stop)
        return job.run(plan(config, asker=asker))


def start_scripted(tree: Mapping[str, Any], *, ranks: int, pause_s: float, log: Path) -> list[subprocess.Popen[bytes]]:
    """The job with a scripted writer, in processes of their own; status 0: whole, 3: stopped and saved."""
    port = free_port()
    recipe = log.with_suffix(".json")
    recipe.write_text(json.dumps(dict(tree)))
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        with open(log.with_suffix(f".{rank}"), "ab") as stream:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(recipe), str(pause_s)],
                    env={
                        **os.environ,
                        **{name: str(value) for name, value in place.items()},
                        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]),
                    },
                    stdout=stream,
                    stderr=stream,
                )
            )
    return processes


def kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """kill -9 of all that still run."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def answers_in(folder: Path) -> list[tuple[str, str]]:
    """(key, text) of every line of every shard, repeated keys included, sorted."""
    from largekd.curation.answer_shards import read_shard, shard_paths

    return sorted((a.written.key, a.written.text) for path in shard_paths(folder) for a in read_shard(path))


def current_answers(folder: Path) -> list[Any]:
    """What curation reads of a job."""
    from largekd.curation.ordering import OrderedAnswers

    return [answer for row in OrderedAnswers(folder, seed=0).rows() for answer in row]


def repeated(answers: Sequence[tuple[str, str]]) -> list[str]:
    """Keys that are there more than once."""
    return [key for key, count in Counter(key for key, _ in answers).items() if count > 1]


def _main() -> int:
    import torch.distributed as dist

    recipe, pause_s = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    whole = run_job(json.loads(Path(recipe).read_text()), backend=ScriptedBackend(pause_s=float(pause_s)))
    dist.destroy_process_group()
    return 0 if whole else 3


if __name__ == "__main__":
    raise SystemExit(_main())
