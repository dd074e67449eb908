"""Make a model folder with a smaller vocabulary: the tokens that a corpus needs, and what they are made of.

    python tools/trim_vocabulary.py assets/smollm2-135m-instruct --corpus assets/math/train.jsonl \\
        --coverage 0.9999 --output runs/smollm2-small-vocabulary

Tokenizer, embedding and head lose the other tokens, and ids are numbered anew; bytes, added and special tokens stay, so
that every text can still be written. A text whose tokens all stay is split as before, and logits of kept tokens are the
old ones. The folder is a student.model; to learn from the untrimmed model set objective.translation, which matches
tokens by what they spell. Exit status: 0 written, 2 an error to mend.
"""

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("largekd") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from largekd.data.store import SampleStore
    from largekd.data.trimming import Trim

REPORT = "trimmed_vocabulary.json"
CHECKED_SAMPLES = 500
# Rows that records are cut to; longer documents go on in the next row, so nothing of them is left out.
ROW_TOKENS = 4096


def main(arguments: list[str] | None = None) -> int:
    """Trim and say what came of it."""
    options = _parser().parse_args(arguments)
    from largekd.errors import LargeKDError

    try:
        report = trim_model(
            options.model,
            corpora=options.corpus,
            output=options.output,
            keep=options.keep,
            coverage=options.coverage,
            multiple=options.multiple,
        )
    except (LargeKDError, FileExistsError) as error:
        sys.stderr.write(f"trim_vocabulary.py: {error}\n")
        return 2
    sys.stdout.write(
        f"wrote {options.output}: {report['tokens']:,} of {report['source_tokens']:,} rows, "
        f"{report['coverage']:.4%} of the corpus's {report['corpus_tokens']:,} tokens; "
        f"{report['same_split']} of {report['checked_samples']} checked samples are split as before\n"
    )
    return 0


def trim_model(
    model: str,
    *,
    corpora: Iterable[str],
    output: Path,
    keep: int | None = None,
    coverage: float | None = None,
    multiple: int = 64,
) -> dict[str, Any]:
    """Write the folder `output` and return its report, which stands there as `trimmed_vocabulary.json` too.

    Raises: ConfigError, DataError for what cannot be read or trimmed; FileExistsError when `output` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it or name another folder")
    from contextlib import nullcontext

    from largekd.data.trimming import choose_tokens, count_tokens, description_of
    from largekd.data.vocabulary import load_tokenizer
    from largekd.models.source import find_model

    source = find_model(model, key="model", revision=None, trust_remote_code=False, first=nullcontext)
    tokenizer = load_tokenizer(str(source.path), key="model")
    samples = [_samples(corpus, tokenizer=tokenizer, vocab_size=source.config.vocab_size) for corpus in corpora]
    counts = count_tokens(_all_ids(samples))
    trim = choose_tokens(
        description_of(tokenizer),
        counts=counts,
        always=_special_ids(tokenizer),
        keep=keep,
        coverage=coverage,
        multiple=multiple,
    )
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    report = {
        "source": model,
        "corpus_tokens": sum(counts.values()),
        "coverage": trim.coverage,
        **_write(part, source=source.path, config=source.config, tokenizer=tokenizer, trim=trim, samples=samples),
    }
    from largekd.runtime.files import write_json

    write_json(part / REPORT, value={**report, "source_ids": trim.kept_V.tolist()})
    for path in part.iterdir():
        path.chmod(0o644)
    part.rename(output)
    return report


def _write(
    part: Path,
    *,
    source: Path,
    config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    trim: "Trim",
    samples: list["SampleStore"],
) -> dict[str, Any]:
    """Tokenizer, weights and configurations; figures of what was written."""
    from largekd.data.trimming import check_trimmed, rename_ids, save_trimmed
    from largekd.initialisation.vocabulary import trim_weights
    from largekd.runtime.files import read_json, write_json

    trimmed = save_trimmed(tokenizer, folder=part, trim=trim)
    texts = [str(tokenizer.decode(ids)) for ids in islice(_all_ids(samples), CHECKED_SAMPLES)]
    same = check_trimmed(tokenizer, trimmed, trim=trim, texts=texts)
    shapes = trim_weights(source, target=part, config=config, kept_V=trim.kept_V)
    new_id = {old: new for new, old in enumerate(trim.kept_V.tolist())}
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            settings = rename_ids(read_json(source / name), new_id=new_id)
            write_json(part / name, value=settings | ({"vocab_size": len(new_id)} if name == "config.json" else {}))
    return {
        "tokens": len(new_id),
        "source_tokens": config.vocab_size,
        "shapes": shapes,
        "checked_samples": len(texts),
        "same_split": same,
    }


def _samples(corpus: str, *, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> "SampleStore":
    """A corpus as training reads it: chat records through the chat template, documents with their end token."""
    from largekd.config.data import SourceConfig
    from largekd.data.samples import load_samples

    source = SourceConfig(path=corpus)
    loaded = load_samples(
        source, tokenizer=tokenizer, sequence_length=ROW_TOKENS, vocab_size=vocab_size, key="--corpus"
    )
    return loaded.samples


def _all_ids(samples: Iterable["SampleStore"]) -> Iterator[list[int]]:
    for store in samples:
        for sample in range(len(store)):
            yield store.ids(sample).tolist()


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Begin, end, padding and such; most of them are added tokens too."""
    return [int(place) for place in tokenizer.all_special_ids]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or hub name")
    parser.add_argument(
        "--corpus", action="append", required=True, help="file, folder or glob of text; may be repeated"
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--keep", type=int, help="keep at most so many tokens")
    size.add_argument("--coverage", type=float, help="keep as few as cover this share of the corpus's tokens")
    parser.add_argument("--multiple", type=int, default=64, help="with --coverage: fill up to a multiple (default 64)")
    parser.add_argument("--output", type=Path, required=True, help="folder to create; it must not exist")
    return parser


if __name__ == "__main__":
    sys.exit(main())
