"""Show what a cache of a teacher holds, and verify its checksums.

python tools/inspect_cache.py FOLDER [--no-verify] [--shards N]

Prints what the cache is bound to, its bytes per token, and from its first shards the mass that is kept and a histogram
of the teacher's entropy (for likeliest ids a lower bound: all other ids are one outcome), and the root mean square of
what is captured of each layer. Exit status 1: a file is
damaged, 2: there is no whole cache.
"""

import argparse
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if importlib.util.find_spec("largekd") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from largekd.teachers.cache_format import Manifest

BAR = 40
EDGES = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, float("inf"))


def main(arguments: list[str] | None = None) -> int:
    """Print and verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="cache.path of the caching job")
    parser.add_argument("--no-verify", action="store_true", help="read no more than the figures need")
    parser.add_argument("--shards", type=int, default=4, help="shards of data.train that figures are of (default 4)")
    options = parser.parse_args(arguments)
    from largekd.errors import TeacherError
    from largekd.teachers.cache_format import read_manifest

    try:
        manifest = read_manifest(options.folder, key="folder")
    except TeacherError as error:
        sys.stderr.write(f"inspect_cache.py: {error}\n")
        return 2
    describe(manifest, folder=options.folder)
    # Figures are read from verified bytes alone.
    damaged = [] if options.no_verify else damaged_files(manifest, folder=options.folder)
    for path in damaged:
        sys.stdout.write(f"DAMAGED {path}\n")
    if damaged:
        return 1
    if not options.no_verify:
        sys.stdout.write("all checksums are right\n")
    show_figures(manifest, folder=options.folder, shards=options.shards)
    return 0


def describe(manifest: "Manifest", *, folder: Path) -> None:
    """What the cache is bound to, and its size."""
    from largekd.teachers.cache_format import shard_path

    identity, teacher = manifest.identity, manifest.identity.teacher
    lines = {
        "digest": manifest.digest,
        "codec": ", ".join(f"{name} {value}" for name, value in identity.codec.model_dump(mode="json").items()),
        "teacher": f"{teacher.model}, {teacher.vocab_size} ids, {teacher.precision}, attention {teacher.attention}",
        "weights": teacher.weights,
        "tokenizer": teacher.tokenizer,
        "rows": f"sequence_length {identity.sequence_length}, packing {identity.packing}",
    }
    if manifest.layers is not None:
        layers = manifest.layers
        lines["layers"] = (
            f"hidden states of {_listed(layers.hidden)}; attention inputs of {_listed(layers.rules)}; of "
            f"{layers.depth}, {layers.precision}, {layers.codec.position_bytes:,} bytes per position"
        )
    for origin, records in manifest.shards.items():
        paths = [shard_path(folder, origin=origin, number=number) for number in range(len(records))]
        size = sum(path.stat().st_size for path in paths if path.is_file())
        tokens = sum(record.tokens for record in records)
        lines[f"data.{origin}"] = (
            f"{identity.data[origin].samples} samples, {tokens} tokens, {len(records)} shards, "
            f"{size / max(tokens, 1):.1f} bytes per token"
        )
        if manifest.layers is not None:
            lines[f"data.{origin}"] += f", {sum(record.positions for record in records)} positions"
    for name, value in lines.items():
        sys.stdout.write(f"{name:11} {value}\n")


def _listed(layers: "Iterable[int]") -> str:
    return ", ".join(map(str, layers)) or "none"


def damaged_files(manifest: "Manifest", *, folder: Path) -> list[Path]:
    """Files that are missing or whose SHA-256 is not that of the manifest."""
    from largekd.teachers.cache_format import HEAD_FILE, TEACHER_FOLDER, file_hash, shard_path

    expected = {
        shard_path(folder, origin=origin, number=number): record.sha256
        for origin, records in manifest.shards.items()
        for number, record in enumerate(records)
    }
    if manifest.head is not None:
        expected[folder / TEACHER_FOLDER / HEAD_FILE] = manifest.head.sha256
    return [path for path, digest in expected.items() if not path.is_file() or file_hash(path) != digest]


def show_figures(manifest: "Manifest", *, folder: Path, shards: int) -> None:
    """Kept mass and entropies of the first shards, and the sizes of captured values."""
    import torch
    from safetensors.torch import load_file

    from largekd.models.build import DTYPES
    from largekd.teachers.cache_codec import TopKCodec, build_codec
    from largekd.teachers.cache_format import shard_path

    teacher = manifest.identity.teacher
    codec = build_codec(
        manifest.identity.codec, vocab_size=teacher.vocab_size, width=teacher.width, dtype=DTYPES[teacher.precision]
    )
    paths = [shard_path(folder, origin="train", number=number) for number in range(len(manifest.shards["train"]))]
    if manifest.layers is not None:
        show_layers(manifest.layers.codec.shapes, paths=paths[:shards])
    if not isinstance(codec, TopKCodec):
        return
    kept, entropies = [], []
    for path in paths[:shards]:
        stored = load_file(path)
        rows = {name: stored[name] for name in codec.shapes}
        found = codec.decode(rows)
        logp = torch.cat([found.logp_TK, found.tail_T[:, None]], -1)
        kept.append(-torch.expm1(found.tail_T))
        entropies.append(-torch.special.xlogy(logp.exp(), logp.exp()).sum(-1))
    mass, entropy = torch.cat(kept), torch.cat(entropies)
    if mass.numel() == 0:
        return
    lowest = torch.quantile(mass[: 1 << 20], torch.tensor([0.01, 0.1]))
    sys.stdout.write(f"kept mass   mean {mass.mean():.5f}, 1 % of tokens below {lowest[0]:.4f}, 10 % {lowest[1]:.4f}\n")
    histogram(entropy)


def show_layers(names: "Iterable[str]", *, paths: "Sequence[Path]") -> None:
    """The root mean square of each captured tensor."""
    from safetensors import safe_open

    for name in names:
        total, count = 0.0, 0
        for path in paths:
            with safe_open(path, framework="pt") as shard:
                values = shard.get_tensor(name).double()
            total, count = total + float(values.square().sum()), count + values.numel()
        sys.stdout.write(f"{name.removeprefix('tap.'):11} root mean square {(total / max(count, 1)) ** 0.5:.4g}\n")


def histogram(entropy_T: "Tensor") -> None:
    """Entropies in nats as bars."""
    sys.stdout.write(f"entropy     mean {entropy_T.mean():.3f} nats\n")
    for low, high in pairwise(EDGES):
        share = float(((entropy_T >= low) & (entropy_T < high)).float().mean())
        sys.stdout.write(f"  {low:4.1f} … {high:<4.1f} {share:6.1%} {'#' * round(BAR * share)}\n")


if __name__ == "__main__":
    raise SystemExit(main())
