"""The exported folder is what transformers loads, whole, and never holds more than a shard and a tensor."""

import errno
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from forked import run_forked
from safetensors.torch import load_file
from torch import Tensor

from largekd.checkpoint import export
from largekd.checkpoint.export import write_export
from largekd.errors import CheckpointError
from largekd.runtime.ranks import Ranks, barrier, current_ranks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def _tiny(*, tied: bool) -> "LlamaForCausalLM":
    # Imported here: the ranks of the two-rank test import this module too.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def _no_extras(folder: Path) -> None:
    pass


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("max_shard_bytes", "sharded"), [(10_000_000, False), (20_000, True)])
def test_transformers_loads_it(tied: bool, max_shard_bytes: int, sharded: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _tiny(tied=tied)

    def save_extras(folder: Path) -> None:
        model.config.save_pretrained(folder)
        assert model.generation_config is not None
        model.generation_config.save_pretrained(folder)

    write_export(
        tmp_path / "export",
        tensors=model.named_parameters(),
        max_shard_bytes=max_shard_bytes,
        save_extras=save_extras,
        ranks=Ranks(),
    )
    assert os.listdir(tmp_path) == ["export"]
    files = os.listdir(tmp_path / "export")
    assert ("model.safetensors" in files) != sharded
    assert ("model.safetensors.index.json" in files) == sharded
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def _tensors(sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    for number, size in enumerate(sizes):
        yield f"t{number}", torch.full((size,), float(number))


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ([10, 10, 10, 10], [["t0", "t1"], ["t2", "t3"]]),
        ([30, 1, 1], [["t0"], ["t1", "t2"]]),
        ([1, 30, 1], [["t0"], ["t1"], ["t2"]]),
        ([20], [["t0"]]),
        ([0, 3, 21], [["t0", "t1"], ["t2"]]),
    ],
)
def test_shards(sizes: list[int], shards: list[list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    write_export(folder, tensors=_tensors(sizes), max_shard_bytes=80, save_extras=_no_extras, ranks=Ranks())
    paths = sorted(folder.glob("*.safetensors"))
    assert [sorted(load_file(path)) for path in paths] == shards
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
        assert [path.name for path in paths] == [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
        assert index["weight_map"] == {
            name: path.name for path, names in zip(paths, shards, strict=True) for name in names
        }


def test_at_most_one_shard_and_one_tensor_are_held(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    peak = 0
    convert = export._converted

    def tracked(tensor: Tensor, *, dtype: torch.dtype | None) -> Tensor:
        nonlocal peak
        copy = convert(tensor, dtype=dtype)
        alive.append(weakref.ref(copy))
        peak = max(peak, sum(held.nbytes for reference in alive if (held := reference()) is not None))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_converted", tracked)
        write_export(
            tmp_path / "export",
            tensors=_tensors([100] * 40),
            max_shard_bytes=1600,
            save_extras=_no_extras,
            ranks=Ranks(),
        )
    assert peak == 1600 + 400


def test_freed_and_strided_tensors_are_copied_and_converted(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.arange(6.0).reshape(2, 3)
        yield "transposed", buffer.T
        buffer.fill_(-1)
        yield "ids", torch.arange(3)
        yield "parameter", torch.nn.Parameter(torch.tensor([0.1]))

    write_export(
        tmp_path / "e",
        tensors=tensors(),
        max_shard_bytes=1000,
        save_extras=_no_extras,
        ranks=Ranks(),
        dtype=torch.bfloat16,
    )
    loaded = load_file(tmp_path / "e" / "model.safetensors")
    assert torch.equal(loaded["transposed"], torch.arange(6.0).reshape(2, 3).T.to(torch.bfloat16))
    assert loaded["ids"].dtype == torch.int64
    assert loaded["parameter"].dtype == torch.bfloat16


def test_an_earlier_export_survives_a_failure_and_is_replaced_by_success(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    write_export(folder, tensors=_tensors([3]), max_shard_bytes=80, save_extras=_no_extras, ranks=Ranks())

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    consumed: list[str] = []

    def recorded() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _tensors([5, 5, 5]):
            consumed.append(name)
            yield name, tensor

    with pytest.raises(CheckpointError, match=r"export could not be written .*No space left .*unchanged"):
        write_export(folder, tensors=recorded(), max_shard_bytes=16, save_extras=full, ranks=Ranks())
    assert consumed == ["t0", "t1", "t2"]
    assert load_file(folder / "model.safetensors")["t0"].numel() == 3
    assert os.listdir(tmp_path) == ["export"]
    (tmp_path / ".tmp-export-export-0123456789ab").mkdir()
    write_export(folder, tensors=_tensors([7]), max_shard_bytes=80, save_extras=_no_extras, ranks=Ranks())
    assert load_file(folder / "model.safetensors")["t0"].numel() == 7
    assert os.listdir(tmp_path) == ["export"]


def test_an_export_beside_another_one_at_work_leaves_it_alone(tmp_path: Path) -> None:
    def others(name: str) -> None:
        write_export(tmp_path / name, tensors=_tensors([3]), max_shard_bytes=80, save_extras=_no_extras, ranks=Ranks())

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        for place, tensor in enumerate(_tensors([10] * 6)):
            if place == 4:
                # Names of which the first one's is a part, from either side.
                for name in ("second", "first-export", "fir"):
                    others(name)
            yield tensor

    write_export(tmp_path / "first", tensors=interrupted(), max_shard_bytes=80, save_extras=_no_extras, ranks=Ranks())
    index = json.loads((tmp_path / "first" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == [f"t{number}" for number in range(6)]
    assert sorted(os.listdir(tmp_path)) == ["fir", "first", "first-export", "second"]


def _export_on_two_ranks(folder: str, fail: bool) -> list[str]:
    """Every tensor needs a collective, as gathering does; rank 0's disk may be full from the second shard on."""
    ranks = current_ranks()

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _tensors([10] * 6):
            barrier()
            yield name, tensor

    if fail:
        real = export.save_file

        def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            if path.name != "part-00000.safetensors":
                raise OSError(errno.ENOSPC, "No space left on device")
            real(tensors, path, metadata=metadata)

        export.save_file = full
    try:
        write_export(Path(folder), tensors=gathered(), max_shard_bytes=80, save_extras=_no_extras, ranks=ranks)
    except CheckpointError as error:
        barrier()
        return [str(error), *os.listdir(Path(folder).parent)]
    barrier()
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("fail", [False, True])
def test_two_ranks(fail: bool, tmp_path: Path) -> None:
    parent = tmp_path / "run"
    outcomes = run_forked(_export_on_two_ranks, tmp_path=tmp_path, world_size=2, folder=str(parent / "e"), fail=fail)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    for outcome in outcomes:
        if fail:
            message, *left = outcome.value
            assert "No space left" in message and left == []
        else:
            assert len(outcome.value) == 4
