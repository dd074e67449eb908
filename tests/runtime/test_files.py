"""Atomic writes and folders that change places."""

import os
from pathlib import Path

import pytest

from largekd.runtime import files
from largekd.runtime.files import atomic_write, read_json, remove_tree, swap_into_place, write_json


def test_atomic_write_replaces_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, value={"b": 1, "a": [None, "ü"]})
    write_json(path, value={"b": 2})
    assert read_json(path) == {"b": 2}
    other = tmp_path / "other"
    other.mkdir()
    atomic_write(other / "x", data=b"1", prepare_in=tmp_path)
    assert (sorted(os.listdir(tmp_path)), os.listdir(other)) == (["a.json", "other"], ["x"])


def _folder(path: Path, *, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("can_exchange", [True, False])
def test_swap(can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda path, other: False)
    new, target = _folder(tmp_path / ".tmp-new", content="1"), tmp_path / "target"
    assert swap_into_place(new, target=target) is None
    former = swap_into_place(_folder(new, content="2"), target=target)
    assert former is not None and former.name.startswith(".tmp-")
    assert ((former / "file").read_text(), (target / "file").read_text()) == ("1", "2")
    assert {former, target} == set(tmp_path.iterdir())


def test_the_kernel_exchanges_here(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", content="a"), _folder(tmp_path / "b", content="b")
    assert files._exchange(a, other=b)
    assert ((a / "file").read_text(), (b / "file").read_text()) == ("b", "a")
    with pytest.raises(FileNotFoundError):
        files._exchange(a, other=tmp_path / "absent")


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    kept = _folder(tmp_path / "kept", content="x")
    (tmp_path / "link").symlink_to(kept)
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "absent")
    assert (kept / "file").is_file() and not (tmp_path / "link").exists()
    remove_tree(kept)
    assert list(tmp_path.iterdir()) == []
