"""Which room may import what, and habits that hold in the whole package."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
from house.checkout import PACKAGE, ROOT, at, files, imports, tree

# A room imports only from blocks above its own, and from itself.
BLOCKS = (
    ("errors",),
    ("config",),
    ("planner", "contracts", "runtime", "sandbox"),
    ("sharding",),
    ("curation", "data", "models", "monitoring"),
    ("initialisation", "objectives", "optim"),
    ("engine",),
    ("teachers",),
    ("checkpoint", "generation", "evaluation"),
    ("distillation",),
    ("factory",),
)
LEVEL = {room: level for level, block in enumerate(BLOCKS) for room in block}
DEEPSPEED_ROOMS = {"engine", "sharding"}
TORCH_FREE_ROOMS = {"errors", "config", "planner"}
# Modules that arrive with a declared dependency under another name, or as a part of it.
COMES_WITH = {
    "google": "tensorboard",
    "huggingface_hub": "transformers",
    "packaging": "transformers",
    "pyarrow": "datasets",
    "pydantic_core": "pydantic",
    "tokenizers": "transformers",
    "yaml": "pyyaml",
}


# What only launch/serve_teacher.py imports may use the extra `serve`.
SERVING = {"teachers/server.py"}
# And only these may use the extra `factory`.
FACTORY_ROOMS = {"curation", "factory"}


def _modules() -> list[Path]:
    return [path for path in files(".py") if path.is_relative_to(PACKAGE) and path != PACKAGE / "__init__.py"]


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {_room(path) for path in _modules()}
    assert rooms - set(LEVEL) == set()
    assert len(rooms) > 10


def test_rooms_import_only_from_blocks_above() -> None:
    wrong = []
    for path in _modules():
        room = _room(path)
        for line, module in imports(path):
            if not module.startswith("largekd."):
                continue
            other = module.split(".")[1]
            if other != room and LEVEL.get(other, len(BLOCKS)) >= LEVEL[room]:
                wrong.append(f"{at(path, line)}: {room} imports {module}")
    assert wrong == []


def _users(module: str) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {}
    for path in _modules():
        for line, imported in imports(path):
            if imported.split(".")[0] == module:
                users.setdefault(_room(path), []).append(at(path, line))
    return users


def test_only_engine_and_sharding_import_deepspeed() -> None:
    users = _users("deepspeed")
    assert {room: lines for room, lines in users.items() if room not in DEEPSPEED_ROOMS} == {}
    assert users, "the search found no import of deepspeed at all"


def test_config_and_planner_have_no_torch() -> None:
    heavy = {module: _users(module) for module in ("torch", "transformers", "datasets")}
    wrong = {
        (module, room): lines
        for module, users in heavy.items()
        for room, lines in users.items()
        if room in TORCH_FREE_ROOMS
    }
    assert wrong == {}
    assert heavy["torch"], "the search found no import of torch at all"


@pytest.mark.parametrize("forbidden", ["print", "eval", "exec", "breakpoint", "input"])
def test_no_call_of(forbidden: str) -> None:
    wrong = [
        at(path, node.lineno)
        for path in _modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == forbidden
    ]
    assert wrong == []


def test_no_module_that_unpickles() -> None:
    wrong = [
        f"{at(path, line)}: {module}"
        for path in _modules()
        for line, module in imports(path)
        if module.split(".")[0] in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    ]
    assert wrong == []


def test_no_bare_or_broad_except() -> None:
    wrong = []
    for path in _modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and not _is_narrow(node):
                wrong.append(at(path, node.lineno))
    assert wrong == []


def _is_narrow(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return False
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in caught)
    # Cleaning up and passing the exception on is no swallowing.
    raises_again = isinstance(handler.body[-1], ast.Raise)
    return not broad or raises_again


def test_no_shapeless_names() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in _modules() if re.search(r"util|helper|misc", path.stem)]
    for path in _modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and re.search(r"Manager|Helper|Util", node.name):
                wrong.append(f"{at(path, node.lineno)}: {node.name}")
    assert wrong == []


def test_imports_are_declared_dependencies() -> None:
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    lines = declared["options"]["install_requires"].split("\n")
    names = {line.split()[0] for line in lines if line.strip()}
    serve, factory = (
        {
            line.split()[0]
            for line in declared["options.extras_require"][extra].split("\n")
            if line.strip() and not line.startswith("#")
        }
        for extra in ("serve", "factory")
    )
    wrong = set()
    for path in _modules():
        for line, module in imports(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top == "largekd":
                continue
            own = names | serve if path.relative_to(PACKAGE).as_posix() in SERVING else names
            own = own | factory if _room(path) in FACTORY_ROOMS else own
            if COMES_WITH.get(top, top) not in own:
                wrong.add(f"{at(path, line)}: {top}")
    assert wrong == set()


def test_every_room_has_a_readme() -> None:
    rooms = [folder for folder in sorted(PACKAGE.iterdir()) if (folder / "__init__.py").exists()]
    assert [room.name for room in rooms if not (room / "README.md").is_file()] == []
    empty = [room.name for room in rooms if not [one for one in room.glob("*.py") if one.name != "__init__.py"]]
    assert empty == [], "a room without code promises something that is not there"


def test_room_init_files_hold_a_docstring_at_most() -> None:
    wrong = []
    for path in PACKAGE.glob("*/__init__.py"):
        body = tree(path).body
        if body and not (len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_file_names_of_tests_are_unique() -> None:
    names = [path.name for path in files(".py") if path.is_relative_to(ROOT / "tests") and path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
