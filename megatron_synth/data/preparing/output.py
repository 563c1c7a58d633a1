"""The output folder of a preparation: written beside its place under a hidden name, put there when it is whole.

One program at a time works on an output: it holds `.NAME.lock` (core/lock.py). A journal in the hidden folder says what is
done. A run that was killed is continued from there by the next with the same settings and inputs; a run that fails with an
error cleans up after itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import sync_folder
from megatron_synth.core.lock import Lock
from megatron_synth.data.preparing.journal import JOURNAL, Journal, read_journal

OLD = "-old"  # after the name of a hidden folder: the output that it is about to replace


class Unfinished(UserError):
    """A preparation ends though nothing is wrong with its settings and its text: what is done is kept."""


def remove_strays(folder: Path, kept: Collection[str]) -> None:
    """Remove what is in the folder but the names to keep."""
    for path in sorted(folder.iterdir()):
        if path.name not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock_of(output: Path) -> Lock:
    """The lock of an output, whose parent exists. All that stands beside the output under its hidden names is its holder's."""
    return Lock(lock_file(output), "prepare")


def lock_file(output: Path) -> Path:
    """Where the lock of an output is."""
    return output.with_name(f".{output.name}.lock")


def is_clean(output: Path) -> bool:
    """Whether nothing stands beside the output that a run has left."""
    return not output.parent.is_dir() or not _named(output, f".{output.name}.")


def partial_name(output: Path) -> Path:
    """The hidden folder of an output that this process writes."""
    return output.parent / f"{_stem(output)}{os.getpid()}"


def partial_folders(output: Path) -> list[Path]:
    """The hidden folders of an output that is being written, or was when its process was killed."""
    if not output.parent.is_dir():
        return []
    return [path for path in _named(output, _stem(output)) if not path.name.endswith(OLD)]


def restore(output: Path) -> None:
    """Clean up after runs that were killed while they put their folder in the place of `output`; under its lock.

    When that happened between the two renames the old output is put back.
    """
    for old in _named(output, _stem(output)):
        if old.name.endswith(OLD):
            if output.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, output)


@contextmanager
def partial_folder(output: Path, head: Mapping[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """A hidden folder beside `output` and its journal, gone on failure; kept when the run is killed, interrupted or unfinished.

    What a killed run left is taken over when its journal begins with the same head, and removed otherwise. Under the lock.
    """
    folder = partial_name(output)
    for old in _named(output, _stem(output)):
        found = read_journal(old / JOURNAL)
        if found and found[0] == head and (old == folder or not folder.exists()):
            os.rename(old, folder)
        else:
            shutil.rmtree(old)
    folder.mkdir(exist_ok=True)
    sync_folder(output.parent)
    try:
        yield folder, Journal(folder, head)
    except (KeyboardInterrupt, Unfinished):
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _stem(output: Path) -> str:
    return f".{output.name}.partial-"


def _named(output: Path, begin: str) -> list[Path]:
    """What stands beside `output` under a name that begins so."""
    return sorted(path for path in output.parent.iterdir() if path.name.startswith(begin))


def replace(folder: Path, output: Path) -> None:
    """Put the finished `folder` in the place of `output`, old content included."""
    sync_folder(folder)
    old = folder.with_name(folder.name + OLD)
    if output.exists():
        os.rename(output, old)
    os.rename(folder, output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)
