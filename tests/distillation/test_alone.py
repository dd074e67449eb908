"""A run without a launcher: one process, one rank, as in a notebook; and a second one after it."""

import json
import subprocess
import sys

from tiny_run import ROOT, settings

PROGRAM = """
import json, sys
import largekd
for path in sys.argv[1:]:
    summary = largekd.distill(json.load(open(path)))
    print("steps", summary["steps"])
"""


def test_two_runs_in_one_process(tiny_assets, tmp_path):
    paths = []
    for name in ("first", "second"):
        tree = settings(
            tiny_assets,
            tmp_path / name,
            train__max_steps=1,
            optim__warmup_steps=0,
            eval__max_rows=2,
            log__level="error",
        )
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(tree))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("steps 1") == 2
    assert (tmp_path / "second/DONE").is_file()
