"""What the documents say is there: paths, commands with their options, keys, imports; and what they must not say."""

import ast
import datetime
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from house.checkout import ROOT, files, tree

DOCUMENTS = [path for path in files(".md") if path.name.startswith(("README", "CONTRIBUTING"))]
TOP_FOLDERS = ("largekd", "launch", "ds_configs", "tests", "tools", "recipes", ".ci")
INTERPRETERS = ("python", "bash", "deepspeed", "srun", ".", "source")
PLACEHOLDER = re.compile(r"[<>{}$…]|\.\.\.|\b[A-Z][A-Z_]{2,}\b(?!\.md)")
OVERRIDE = re.compile(r"^[a-z_]+(\.[a-z_0-9]+)+=")


def _spans(text: str) -> list[str]:
    """Inline code spans outside code blocks, on one line each."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]


def _blocks(text: str, languages: tuple[str, ...]) -> list[str]:
    blocks = re.findall(r"^```([a-z]*)\n(.*?)^```", text, flags=re.M | re.S)
    indented = re.findall(r"(?:^(?:    .*)?\n)+", text, flags=re.M) if "" in languages else []
    return [body for language, body in blocks if language in languages] + indented


def commands(text: str) -> list[list[str]]:
    """The words of every command line in shell blocks and code spans; comments and environment settings removed."""
    shell = "\n".join(_blocks(text, ("", "bash", "sh", "console")))
    lines = shell.replace("\\\n", " ").splitlines() + _spans(text)
    found = []
    for line in lines:
        words = line.split("#")[0].strip().removeprefix("$ ").split()
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words.pop(0)
        if words and words[0] in INTERPRETERS:
            found.append(words)
    return found


def _script(words: list[str]) -> tuple[str, int] | None:
    for position, word in enumerate(words[1:], start=1):
        if word.endswith((".py", ".sh")) and not PLACEHOLDER.search(word):
            return word, position
    return None


@cache
def _help(script: Path) -> str:
    if script.suffix == ".sh":
        return script.read_text(encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, f"{script} --help: {finished.stderr[-2000:]}"
    return finished.stdout


@cache
def _launcher_options() -> str:
    found = importlib.util.find_spec("deepspeed")
    assert found is not None and found.origin is not None
    return (Path(found.origin).parent / "launcher" / "runner.py").read_text(encoding="utf-8")


def test_there_are_documents() -> None:
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "largekd" / "README.md"} <= set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    missing = []
    text = document.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for word in [*links, *(word for span in _spans(text) for word in span.split())]:
        word = word.strip(",;:()'\"").split("::")[0]
        if not word or PLACEHOLDER.search(word) or not _looks_like_a_path(word, links=links):
            continue
        if not any(
            any(base.glob(word.strip("/"))) for base in (ROOT, ROOT / "largekd", document.parent) if word.strip("/")
        ):
            missing.append(word)
    assert missing == []


def _looks_like_a_path(word: str, *, links: list[str]) -> bool:
    if word in links or word.startswith(tuple(f"{folder}/" for folder in TOP_FOLDERS)):
        return True
    # Bare names are checked only where they name source: outputs such as summary.json are not in the checkout.
    return re.fullmatch(r"[\w/.-]+\.(py|sh|cfg|toml)", word) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist_with_their_options(document: Path) -> None:
    wrong = []
    for words in commands(document.read_text(encoding="utf-8")):
        found = _script(words)
        if found is None:
            continue
        script, position = found
        path = next((base / script for base in (ROOT, document.parent) if (base / script).is_file()), None)
        if path is None:
            wrong.append(f"no {script}")
            continue
        known = {"deepspeed": _launcher_options}.get(words[0], str)()
        options = [(word, known) for word in words[1:position]] if words[0] == "deepspeed" else []
        options += [(word, _help(path)) for word in words[position + 1 :]]
        for word, text in options:
            option = re.match(r"^\[?(--[a-z][a-z_-]*)", word)
            if option and not re.search(rf"{option[1]}(?![a-z_-])", text):
                wrong.append(f"{script}: no option {option[1]}")
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_overrides_name_keys_of_the_configuration(document: Path) -> None:
    wrong = []
    for words in commands(document.read_text(encoding="utf-8")):
        for word in words:
            if OVERRIDE.match(word) and re.sub(r"\.\d+\b", ".*", word.partition("=")[0]) not in _keys():
                wrong.append(word)
    assert wrong == []


@cache
def _keys() -> frozenset[str]:
    """Every key of the configuration, and every record that may be replaced as a whole (`data.train=FILE`)."""
    from largekd.config.schema import run_keys

    names = [key.name for key in run_keys()]
    return frozenset(names) | {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_parse_and_import_what_exists(document: Path) -> None:
    wrong = []
    for block in _blocks(document.read_text(encoding="utf-8"), ("python",)):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("largekd"):
                wrong += [
                    f"{node.module}.{alias.name}" for alias in node.names if not _defined(node.module, alias.name)
                ]
    assert wrong == []


def _defined(module: str | None, name: str) -> bool:
    base = ROOT.joinpath(*str(module).split("."))
    if base.is_dir() and (base / f"{name}.py").is_file():
        return True
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not source.is_file():
        return False
    defined = {getattr(node, "name", None) for node in tree(source).body}
    assigned = {target.id for node in ast.walk(tree(source)) for target in _targets(node)}
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree(source))
        for alias in getattr(node, "names", ())
        if isinstance(alias, ast.alias)
    }
    return name in defined | assigned | imported


def _targets(node: ast.AST) -> list[ast.Name]:
    if isinstance(node, ast.Assign):
        return [target for target in node.targets if isinstance(target, ast.Name)]
    return [node.target] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


# Written so that this file does not find itself.
FORBIDDEN = {
    "row id of a requirement": r"\bS[0-4][.]\d+\b",
    "number of an issue": r"\b[Ii]ssue[s]? #?\d",
    "path of one machine": r"/(?:work|root|home)/[a-z]",
    "host of a package index": r"(?:pypi|pythonhosted)[.]org",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_private_references(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    wrong = []
    for path in files(".py", ".md", ".sh", ".yaml", ".json", ".cfg", ".toml", ".txt", "run", ".example", ".ipynb"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert wrong == []


def test_log_is_dated_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "LOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert headings
    dates = []
    for heading in headings:
        found = re.match(r"(\d{4}-\d{2}-\d{2})\b.*\w", heading)
        assert found, f"no date and verdict: {heading}"
        dates.append(datetime.date.fromisoformat(found[1]))
    assert dates == sorted(dates, reverse=True)


def test_the_reader_of_commands_sees_blocks_spans_and_continued_lines() -> None:
    text = "\n".join(
        (
            "Run `python tools/doctor.py --json` or",
            "```bash",
            "OMP_NUM_THREADS=1 deepspeed --no_ssh \\",
            "    launch/train.py --config x.yaml  # a remark",
            "```",
            "    bash tests/run.sh --all",
            "```python",
            "python = 1",
            "```",
        )
    )
    assert commands(text) == [
        ["deepspeed", "--no_ssh", "launch/train.py", "--config", "x.yaml"],
        ["bash", "tests/run.sh", "--all"],
        ["python", "tools/doctor.py", "--json"],
    ]
