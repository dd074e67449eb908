"""Weights that differ have different digests."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llama

from largekd.models.digest import sampled_weights_digest


def test_equal_weights_are_equal_and_one_changed_number_is_seen(tmp_path: Path) -> None:
    one, two = (save_tiny_llama(tmp_path / name, seed=0) for name in ("one", "two"))
    assert sampled_weights_digest(one) == sampled_weights_digest(two)
    weights = load_file(two / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[7] += 1e-3
    save_file(weights, two / "model.safetensors")
    assert sampled_weights_digest(one) != sampled_weights_digest(two)


def test_a_large_file_is_sampled_at_both_ends_and_between(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(8 << 20, dtype=torch.uint8)}, path)
    plain, size = sampled_weights_digest(tmp_path), path.stat().st_size
    for at in (size - 1, size // 2, 300):
        body = bytearray(path.read_bytes())
        before = body[at : at + 200_000]
        body[at : at + 200_000] = b"\x01" * len(before)
        path.write_bytes(body)
        assert sampled_weights_digest(tmp_path) != plain
        body[at : at + 200_000] = before
        path.write_bytes(body)
    assert sampled_weights_digest(tmp_path) == plain
