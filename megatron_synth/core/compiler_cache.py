"""Where compiled kernels are kept: code is loaded from there, so the folder must be this user's alone.

torch's own choice is /tmp/torchinductor_USER, a name that another user of the machine can make beforehand.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_to_own_folder() -> None:
    """Name a folder that is nobody else's to torch's compiler, unless the environment names one. As launch/env.sh does."""
    if os.environ.get(VARIABLE):
        return
    folder = Path(tempfile.gettempdir()) / f"megatron-synth-{os.getuid()}"
    with contextlib.suppress(OSError):  # it may be there
        folder.mkdir(mode=0o700)
    if not _is_ours_alone(folder):
        folder = Path(tempfile.mkdtemp())
    os.environ[VARIABLE] = str(folder / "inductor")


def _is_ours_alone(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
