"""The files of the checkout, for tests that read them."""

import ast
import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "largekd"
_NOT_OURS = {"assets", "runs", "build", "dist", "__pycache__"}


@cache
def files(*suffixes: str) -> tuple[Path, ...]:
    """Files of the checkout with one of the suffixes, without environments, caches and fetched data."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        hidden = {name for name in folders if name.startswith(".") and name != ".ci"}
        environments = {name for name in folders if (Path(folder) / name / "pyvenv.cfg").exists()}
        ignored = hidden | environments | _NOT_OURS | {name for name in folders if name.endswith(".egg-info")}
        folders[:] = sorted(set(folders) - ignored)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(suffixes)]
    return tuple(found)


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in the file, at any depth; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def at(path: Path, line: int) -> str:
    """`file:line` relative to the checkout."""
    return f"{path.relative_to(ROOT)}:{line}"
