"""State that tests save: a shard per rank, a JSON value and the random generators, all functions of the step."""

import hashlib
from pathlib import Path

from largekd.checkpoint.commit import CheckpointStore
from largekd.checkpoint.state import JsonOwner, RandomOwner, StateOwner, load_state, save_state
from largekd.runtime.ranks import Ranks, current_ranks, new_control_group
from largekd.runtime.seeds import seed_everything

SHARD_BYTES = 40_000


def shard(*, step: int, rank: int, size: int = SHARD_BYTES) -> bytes:
    """The bytes a rank saves at a step."""
    seed = f"{step}/{rank}".encode()
    return b"".join(hashlib.sha256(seed + bytes([i % 256, i // 256])).digest() for i in range(size // 32))


class ShardOwner:
    """One binary file per rank."""

    def __init__(self, *, ranks: Ranks, size: int = SHARD_BYTES) -> None:
        self.ranks = ranks
        self.size = size
        self.step = 0

    def save(self, folder: Path) -> None:
        (folder / f"shard_{self.ranks.rank}.bin").write_bytes(
            shard(step=self.step, rank=self.ranks.rank, size=self.size)
        )

    def load(self, folder: Path) -> None:
        self.loaded = (folder / f"shard_{self.ranks.rank}.bin").read_bytes()


class Job:
    """A run that does nothing but count, save and resume."""

    def __init__(self, folder: Path, *, ranks: Ranks, keep: int = 2, size: int = SHARD_BYTES, group=None) -> None:
        self.ranks = ranks
        self.step = 0
        self.store = CheckpointStore(folder, ranks=ranks, keep=keep, fingerprint="test", group=group)
        self.shards = ShardOwner(ranks=ranks, size=size)
        self.owners: dict[str, StateOwner] = {
            "engine": self.shards,
            "progress": JsonOwner(get=lambda: {"step": self.step}, put=self._put, ranks=ranks),
            "rng": RandomOwner(ranks=ranks),
        }

    def _put(self, value: dict[str, int]) -> None:
        self.step = value["step"]

    def save(self, step: int) -> Path:
        self.step = self.shards.step = step
        seed_everything(step)
        return save_state(self.store, step=step, owners=self.owners)

    def resume(self) -> int:
        """The step of the newest checkpoint, 0 without one; checks that all that was loaded belongs to that step."""
        path = self.store.newest()
        if path is None:
            return 0
        load_state(path, owners=self.owners)
        assert self.shards.loaded == shard(step=self.step, rank=self.ranks.rank, size=self.shards.size)
        assert path.name == f"step_{self.step:08d}"
        return self.step


def run_job(folder: str, steps: list[int], control: bool = True) -> int:
    """Resume, then save at every later step of `steps`; returns the step it resumed from."""
    group = new_control_group(timeout_s=20) if control else None
    job = Job(Path(folder), ranks=current_ranks(), group=group)
    job.store.prepare()
    start = job.resume()
    for step in steps:
        if step > start:
            job.save(step)
    return start
