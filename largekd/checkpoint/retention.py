"""Which checkpoints go. A deletion that is cut off leaves a temporary folder, never half a checkpoint."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from largekd.runtime.files import TEMPORARY_PREFIX, fsync_path, remove_tree, temporary_sibling

logger = logging.getLogger(__name__)


def expired(newest_first: Sequence[str], *, keep: int, is_whole: Callable[[str], bool]) -> list[str]:
    """The names older than the `keep`-th whole checkpoint, newest first.

    `is_whole` verifies a checkpoint in full. It is asked from the newest on and only while there could be something to
    delete, so that a damaged checkpoint never counts as one of those that are kept.
    """
    assert keep >= 2, keep
    whole = 0
    for position, name in enumerate(newest_first):
        if position + 1 == len(newest_first):
            break
        whole += is_whole(name)
        if whole == keep:
            return list(newest_first[position + 1 :])
    return []


def delete_checkpoints(folder: Path, *, names: Sequence[str]) -> None:
    """Remove `names` from `folder`, oldest first: out of sight by a rename, then file by file."""
    for name in reversed(names):
        aside = temporary_sibling(folder / name, label=f"old-{name}")
        os.replace(folder / name, aside)
        fsync_path(folder)
        remove_tree(aside)
        logger.debug("removed checkpoint %s", folder / name)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted save, deletion or write left behind."""
    for path in sorted(folder.glob(f"{TEMPORARY_PREFIX}*")):
        remove_tree(path)
        logger.info("removed %s, left by an interrupted save", path)
