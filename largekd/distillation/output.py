"""What a finished run leaves: the exported student and the summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largekd.checkpoint.export import write_export
from largekd.config.run import RunConfig
from largekd.config.staging import same_held_out, stages_of
from largekd.distillation.builder import Parts
from largekd.distillation.journal import Journal
from largekd.models.build import DTYPES, config_with_layers
from largekd.models.depth import layers_at_depth
from largekd.models.export import save_extras, stream_tensors
from largekd.models.lora import adapter_tensors, save_adapter
from largekd.models.pruning import pruned_config, pruned_tensors
from largekd.monitoring.memory import process_memory
from largekd.monitoring.monitor import TENSORBOARD_FOLDER
from largekd.monitoring.summary import SUMMARY_FILE, EvalFigures, RunSummary
from largekd.runtime.ranks import Ranks, gather_objects
from largekd.teachers.ema import EMATeacher
from largekd.teachers.self_shared import SelfSharedTeacher

EXPORT_FOLDER = "export"
ADAPTER_FOLDER = "adapter"


def export_student(parts: Parts, *, folder: Path) -> Path:
    """Write the student, or the average of its weights, as a plain Hugging Face folder, one gathered tensor at a time.

    A collective call.
    """
    config, target = parts.config, folder / EXPORT_FOLDER
    model = parts.student.model
    if config.export.weights == "teacher_average":
        assert isinstance(parts.teacher, EMATeacher)
        model = parts.teacher.model
    dtype = DTYPES[config.export.dtype or config.train.precision]

    lora, own = config.student.lora, {}
    if config.export.adapter:
        for name, tensor in adapter_tensors(model):
            # All ranks take part in gathering; one of them writes.
            if parts.ranks.is_main:
                own[name] = tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()

    # A self-shared student is smaller than the model it was trained in.
    pruned = parts.teacher.student if isinstance(parts.teacher, SelfSharedTeacher) else None
    layers, model_config = None, None if pruned is None else pruned_config(pruned)
    if config.export.depth is not None:
        layers = layers_at_depth(depth=config.export.depth, of=model.config.num_hidden_layers, key="export.depth")
        model_config = config_with_layers(model.config, layers=layers, key="export.depth")

    def extras(pending: Path) -> None:
        save_extras(
            pending,
            model=model,
            dtype=dtype,
            tokenizer=parts.sources.tokenizer,
            source=parts.sources.tokenizer_folder,
            model_config=model_config,
        )
        if own:
            assert lora is not None and config.student.model is not None
            save_adapter(pending / ADAPTER_FOLDER, model=model, config=lora, tensors=own, base=config.student.model)

    write_export(
        target,
        tensors=stream_tensors(model, layers=layers) if pruned is None else pruned_tensors(pruned),
        max_shard_bytes=config.export.max_shard_bytes,
        save_extras=extras,
        ranks=parts.ranks,
        dtype=dtype,
    )
    return target


def write_summary(
    folder: Path, *, journal: Journal, export_dir: Path, config: RunConfig, ranks: Ranks
) -> dict[str, Any]:
    """Write summary.json and return it. A collective call."""
    progress, after = journal.progress, journal.evaluations.get("after")
    before = _student_figures(journal.evaluations.get("before"), depth=config.export.depth)
    stages = stages_of(config)
    first, last = stages[0].config, stages[-1].config
    note = None
    if before is not None and not same_held_out(first, last):
        before, note = None, "the first stage was evaluated on other tokens than the last; see evaluation.jsonl"
    elif before is not None and first.teacher != last.teacher:
        # A distance to another teacher.
        before = EvalFigures(perplexity=before.perplexity)
    summary = RunSummary(
        steps=progress.step,
        tokens=progress.tokens,
        skipped_steps=progress.skipped_steps,
        wall_s=journal.wall_s,
        tokens_per_s=progress.tokens / progress.train_s if progress.train_s else 0.0,
        peak_rss_bytes=gather_objects(process_memory().peak_rss_bytes),
        before=before,
        after=_student_figures(after, depth=config.export.depth),
        note=note,
        teacher=EvalFigures(perplexity=after["teacher_perplexity"]) if after else None,
        export_dir=str(export_dir),
        tensorboard_dir=str(folder / TENSORBOARD_FOLDER) if config.log.tensorboard else None,
    )
    if ranks.is_main:
        summary.write(folder / SUMMARY_FILE)
    return summary.as_mapping()


def _student_figures(figures: Mapping[str, float] | None, *, depth: int | None) -> EvalFigures | None:
    """Those of the student that is exported."""
    if not figures:
        return None
    prefix = "" if depth is None else f"depth_{depth}/"
    return EvalFigures(perplexity=figures[f"{prefix}perplexity"], kl=figures[f"{prefix}kl"])
