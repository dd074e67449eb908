"""How much on-policy training lowers reverse KL on the student's own fresh samples, seed by seed.

    python tools/on_policy_gain.py --student runs/quickstart/export
    python tools/on_policy_gain.py --student runs/quickstart/export --table

For each seed recipes/on_policy.yaml goes on from that student, with reverse KL on its own samples alone. Before and
after, fixed held-out prompts are answered anew by the student, and KL(student‖teacher) is averaged over the tokens of
these answers. Rows are appended to runs/on_policy_gain/NAME/rows.jsonl; the same command goes on where it stopped.
Exit status: 0 all rows are there, 1 a run failed, 2 an error to mend.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation import Run, append_row, discard_weights, is_finished, launch, read_rows

from largekd.config.checks import check_world
from largekd.config.render import render_config
from largekd.config.run import RunConfig
from largekd.errors import ConfigError, LargeKDError
from largekd.runtime.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "on_policy_gain"
RECIPE = "recipes/on_policy.yaml"
ROWS = "rows.jsonl"

ROWS_OF_STEP = 8
# 64 tokens of a problem and 48 of an answer: short enough for two cores.
SETTINGS = (
    "train.max_steps=24",
    f"train.global_batch_size={ROWS_OF_STEP}",
    "train.micro_batch_size={micro_batch_size}",
    "train.sequence_length=111",
    "optim.lr=3e-4",
    "optim.warmup_steps=2",
    "objective.alpha=1",
    "rollouts.share=1",
    "rollouts.reuse=1",
    "rollouts.log_samples=0",
    "student.teacher_layers=null",
    "eval.before=false",
    "eval.max_rows=4",
    "checkpoint.every_steps=0",
    "log.health_every_steps=0",
    "log.tensorboard=false",
    "log.progress=false",
)


def main(argv: list[str]) -> int:
    """Read the command line, do the seeds that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, after the tool's own keys")
    parser.add_argument("--student", required=True, metavar="FOLDER", help="student to begin with, such as an export")
    parser.add_argument("--name", default="default", metavar="NAME", help="folder below runs/on_policy_gain")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="values of train.seed (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of a run (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="held-out prompts (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of the rows so far, and run nothing")
    given = parser.parse_intermixed_args(argv)
    folder = RUNS / given.name
    failed = 0
    known: dict[str, float] = {}
    try:
        if not given.table:
            overrides = (*_settings(ranks=given.ranks), f"student.model={json.dumps(given.student)}", *given.overrides)
            seeds = [int(seed) for seed in given.seeds.split(",") if seed.isdecimal()]
            for seed in dict.fromkeys(seeds):
                run = Run(
                    variant="on_policy",
                    seed=seed,
                    folder=folder / f"seed{seed}",
                    base=RECIPE,
                    overrides=(*overrides, f"train.seed={seed}"),
                    ranks=given.ranks,
                )
                failed += not _row_exists(run, prompts=given.prompts, known=known)
        sys.stdout.write(table(read_rows(folder / ROWS)) + "\n")
    except LargeKDError as error:
        sys.stderr.write(f"on_policy_gain: {error}\n")
        return 2
    return 1 if failed else 0


def _settings(*, ranks: int) -> list[str]:
    """The tool's own keys: each rank takes its rows of a step at once. Errors: ConfigError."""
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: must be at least 1.")
    return [key.format(micro_batch_size=max(ROWS_OF_STEP // ranks, 1)) for key in SETTINGS]


def _row_exists(run: Run, *, prompts: int, known: dict[str, float]) -> bool:
    """Do the run and write its row unless it is there; `known` keeps what was measured of the first student.

    Errors: ConfigError for rows of other settings.
    """
    rows = run.folder.parent / ROWS
    key = {**run.key, "prompts": prompts}
    found = next((row for row in read_rows(rows) if row["seed"] == run.seed), None)
    if found is not None:
        if any(found[name] != value for name, value in key.items()):
            raise ConfigError(f"{rows} has seed {run.seed} with other settings; choose another --name.")
        return True
    config = run.config()
    check_world(config, world_size=run.ranks)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    recipe, log = (run.folder.with_name(f"{run.folder.name}.{ending}") for ending in ("yaml", "log"))
    if not is_finished(run):
        atomic_write(recipe, data=render_config(config).encode())
        status = launch(recipe, run.ranks, log)
        if not is_finished(run):
            sys.stderr.write(f"seed {run.seed}: not finished (exit status {status}); see {log}\n")
            return False
    first = str(config.student.model)
    if first not in known:
        known[first] = reverse_kl_of_samples(config, student=Path(first), prompts=prompts)
    before, after = known[first], reverse_kl_of_samples(config, student=run.folder / "export", prompts=prompts)
    append_row(rows, row={"seed": run.seed, "before": before, "after": after, "ratio": after / before, **key})
    discard_weights(run)
    return True


def reverse_kl_of_samples(config: RunConfig, *, student: Path, prompts: int) -> float:
    """Mean over the tokens of fresh answers of Σ_v q log(q/p), in nats, in float32.

    The prompts are the beginnings of the first held-out texts, and each has its own uniform numbers, the same for every
    student.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from largekd.generation.sampling import DrawRule
    from largekd.generation.writer import Question, Writer, stop_tokens
    from largekd.runtime.ranks import Ranks

    assert config.rollouts is not None and config.data.eval is not None and config.teacher.kind == "online"
    tokenizer = AutoTokenizer.from_pretrained(student)
    lines = Path(config.data.eval.path).read_text(encoding="utf-8").splitlines()[:prompts]
    beginnings = [tokenizer(json.loads(line)["text"])["input_ids"][: config.rollouts.prompt_tokens] for line in lines]
    models = [
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (student, config.teacher.model)
    ]
    for model in models:
        model.eval()
    writer = Writer(
        models[0],
        rule=DrawRule(ids=models[0].config.vocab_size),
        stops=stop_tokens(tokenizer, folder=student),
        max_new_tokens=config.rollouts.max_new_tokens,
        batch_size=16,
        gather="streamed",
        device=torch.device("cpu"),
        ranks=Ranks(),
    )
    questions = [Question(np.array(ids, np.int32), seed=(20_240_601, place)) for place, ids in enumerate(beginnings)]
    answers = writer.write(questions, calls=-(-len(questions) // 16), beat=lambda: None)
    total, tokens = 0.0, 0
    for ids, answer in zip(beginnings, answers, strict=True):
        whole = torch.tensor([[*ids, *answer.ids]])
        with torch.no_grad():
            logq, logp = (model(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1) for model in models)
        total += float((logq.exp() * (logq - logp)).sum())
        tokens += len(answer.ids)
    return total / tokens


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: reverse KL before and after for each seed, and the mean ratio."""
    if not rows:
        return "no rows yet"
    lines = ["| seed | before, nats per token | after | ratio |", "|---|---|---|---|"]
    lines += [f"| {row['seed']} | {row['before']:.4f} | {row['after']:.4f} | {row['ratio']:.3f} |" for row in rows]
    ratios = [row["ratio"] for row in rows]
    lines.append(f"\nmean ratio {statistics.fmean(ratios):.3f}, worst {max(ratios):.3f}, over {len(rows)} seeds")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("on_policy_gain: stopped; the same command goes on") from None
