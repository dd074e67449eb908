"""Who owns the state of a run, and saving and loading all of it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from largekd.checkpoint.commit import CheckpointStore, step_folder
from largekd.errors import CheckpointError
from largekd.runtime.faults import fault_point
from largekd.runtime.files import read_json, write_json
from largekd.runtime.ranks import Ranks, Together
from largekd.runtime.seeds import load_random_state, save_random_state

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class StateOwner(Protocol):
    """Something that must survive a restart. Both methods run on every rank, with the same existing folder."""

    def save(self, folder: Path) -> None:
        """Write all of it under `folder`; files of one rank carry its number. The caller flushes them.

        A rank that cannot write raises only after the collectives of the save, or the others wait for it.
        """

    def load(self, folder: Path) -> None:
        """Become what was saved. The folder was verified."""


class JsonOwner:
    """State that is a JSON value: `state.json`, written by rank 0 and read by all, or one file per rank."""

    def __init__(
        self, *, get: Callable[[], Any], put: Callable[[Any], None], ranks: Ranks, per_rank: bool = False
    ) -> None:
        self._get = get
        self._put = put
        self._writes = per_rank or ranks.is_main
        self._file = f"rank_{ranks.rank:05d}.json" if per_rank else "state.json"

    def save(self, folder: Path) -> None:
        """Write what `get` returns."""
        if self._writes:
            write_json(folder / self._file, value=self._get())

    def load(self, folder: Path) -> None:
        """Hand the saved value to `put`. Raises CheckpointError when there is no file for this rank."""
        try:
            value = read_json(folder / self._file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / self._file}: cannot be read ({error})") from error
        self._put(value)


class RandomOwner:
    """The global random generators of this rank."""

    def __init__(self, *, ranks: Ranks) -> None:
        self._rank = ranks.rank

    def save(self, folder: Path) -> None:
        """Write this rank's generators."""
        save_random_state(folder, rank=self._rank)

    def load(self, folder: Path) -> None:
        """Set them. Raises CheckpointError when this rank has none there."""
        load_random_state(folder, rank=self._rank)


class _WrittenTogether(Together):
    """Together, with a failed write explained on its own rank: only there is its class known."""

    def __init__(self, *, store: CheckpointStore, step: int) -> None:
        super().__init__(group=store.group)
        self._store = store
        self._step = step

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, None if error is None else self._store.explain(error, step=self._step), trace)


def save_state(store: CheckpointStore, *, step: int, owners: Mapping[str, StateOwner]) -> Path:
    """Commit a checkpoint with one folder per owner and return its path; a step that is saved already is left alone.

    Raises CheckpointError on every rank when one could not write.
    """
    assert all(_NAME.fullmatch(name) for name in owners), list(owners)
    target = store.folder / step_folder(step)
    if store.is_whole(step=step):
        return target
    with store.writing(step=step) as folder:
        fault_point("save:before_shard", rank=store.ranks.rank, step=step)
        for position, (name, owner) in enumerate(owners.items()):
            # The next owner may hold a collective, in which a rank that failed here would be missing.
            with _WrittenTogether(store=store, step=step):
                (folder / name).mkdir(exist_ok=True)
                owner.save(folder / name)
                if position == 0:
                    fault_point("save:mid_shard", rank=store.ranks.rank, step=step)
    return target


def load_state(path: Path, *, owners: Mapping[str, StateOwner]) -> None:
    """Load every owner from a verified checkpoint, in the order given.

    Raises CheckpointError, before anything is loaded, when the checkpoint holds the state of other owners.
    """
    held = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if held != set(owners):
        missing, extra = sorted(set(owners) - held), sorted(held - set(owners))
        raise CheckpointError(
            f"{path} belongs to a run of another kind: it lacks {missing or 'nothing'} and holds {extra or 'nothing'} "
            "besides; resume with the configuration it was saved with, or set run.fresh=true"
        )
    for name, owner in owners.items():
        owner.load(path / name)
