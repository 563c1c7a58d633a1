"""A copy of this package for a job, so that a job that is requeued next month runs the code that it was submitted with."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.train.record.run_dir import COMMIT_FILE, git_state

_PACKAGES = ("megatron_synth", "megatron_synth_kernels")


def take(code: Path) -> str:
    """Copy the packages to `code`, with the commit they are of; what was copied, in words.

    Where the checkout has changes that are not committed, they are in the copy, and `code`/changes.patch has them by
    themselves: commit and patch name the code exactly. Files that git does not track are in the copy only.
    """
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        source = Path(next(iter(spec.submodule_search_locations)))
        shutil.copytree(source, code / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    package_folder = COMMIT_FILE.parent
    state = git_state(package_folder)
    if state is None:
        return "as installed, of no commit"
    write_json(code / package_folder.name / COMMIT_FILE.name, state)
    short = str(state["commit"])[:10]
    if not state["dirty"]:
        return f"commit {short}"
    if not COMMIT_FILE.is_file():
        command = ["git", "-C", str(package_folder), "diff", "--binary", "HEAD"]
        write_atomic(code / "changes.patch", subprocess.run(command, capture_output=True, check=True).stdout)
    return f"commit {short} with local changes"
