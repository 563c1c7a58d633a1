"""`make gpu-bundle`: a folder with all that a machine with torch alone lacks to run `bench gpu` and the tests of a GPU.

    python -m tests.gpu.bundle OUT [--te ARCHIVE]

To be run by a Python of the version that the machine has, in an environment with the packages of a run, such as that of
`make gpu-rehearsal`: they are copied from it. On the machine nothing is installed and nothing is fetched: `OUT/start.sh`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from megatron_synth.train.record.run_dir import COMMIT_FILE, git_state

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 64 * 2**20
"""Bytes of the folder, at most."""
FOLDERS = ("megatron_synth", "kernels", "configs", "launch", "tests")
FILES = ("pyproject.toml", "LICENSE", "docs/gpu-rehearsal.md")
PRESENT = ("torch", "numpy")
"""What the machine has, with all that these need, such as Triton and NVIDIA's libraries."""
NOT_NEEDED = ("datasets", "wandb", "huggingface_hub", "pyarrow", "torch")
"""Imported where text is prepared or a tracker is asked for, and not by a benchmark or a test of a GPU."""
FOR_TESTS = ("pytest", "hypothesis")

START = """#!/bin/sh
# On a machine with Python {python}, torch with CUDA and nothing else: no pip, no network. The folder may be read-only.
#   start.sh            `bench gpu`, again until it is done; the result is ${{OUT:-.}}/bench-gpu.json
#   start.sh tests      tests of a GPU
#   start.sh ANYTHING   megatron-synth ANYTHING
# PYTHON=... names another Python than python3; CC=... the C compiler that Triton needs.
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != {version})' || {{
    echo "start.sh: $python is not Python {python}, for which this was made: set PYTHON" >&2; exit 2; }}
site=$here/site
for archive in "$here"/*.tar.xz; do
    [ -e "$archive" ] || continue
    name=$(basename "$archive" .tar.xz)
    place=${{TMPDIR:-/tmp}}/megatron-synth-$(id -u)-$name
    if [ ! -e "$place/.whole" ]; then
        echo "start.sh: unpacking $name into $place" >&2
        mkdir -p "$place" && "$python" -c 'import sys, tarfile
tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$archive" "$place" && : > "$place/.whole" || exit 2
    fi
    site=$site:$place
done
export PYTHONPATH="$here:$here/kernels:$site${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONDONTWRITEBYTECODE=1
export NVTE_FRAMEWORK=pytorch NVTE_CUDA_INCLUDE_DIR="${{NVTE_CUDA_INCLUDE_DIR:-/usr/local/cuda/include}}"
case ${{1:-bench}} in
tests) shift; exec "$python" -m pytest -m gpu -p no:cacheprovider "$@" "$here/tests/gpu" ;;
bench) [ $# -gt 0 ] || set -- bench gpu --json "${{OUT:-.}}/bench-gpu.json"; exec "$python" -m megatron_synth "$@" ;;
*) exec "$python" -m megatron_synth "$@" ;;
esac
"""


def needed_by(names: Iterable[str]) -> set[str]:
    """The packages with all that they require, as installed here, by normalized name."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = normalized(waiting.pop())
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform or version of Python
        found.add(name)
        requirements = map(Requirement, requires)
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def normalized(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def copy_package(name: str, to: Path) -> None:
    """Copy an installed package's files below its site folder."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        if ".." in file.parts or "__pycache__" in file.parts or file.suffix == ".pyc" or "tests" in file.parts:
            continue
        source, target = Path(str(distribution.locate_file(file))), to / file
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def compile_native(folder: Path) -> None:
    """The data's compiled functions; by a name that every Python accepts, since they use none of it."""
    source = ROOT / "megatron_synth/data/shards/native.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:15]  # as setup.py
    command = ["cc", "-O3", "-shared", "-fPIC", f"-DSOURCE_DIGEST=0x{digest}", str(source), "-o", str(folder / "_native.so")]
    subprocess.run(command, check=True)


def strip(folder: Path) -> None:
    """Leave out what only debuggers read of compiled modules."""
    for library in folder.rglob("*.so"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)


def make(out: Path, archive: Path | None) -> int:
    """The folder `out`, with TransformerEngine's archive if it is given and fits; its size in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", *FOLDERS, *FILES], capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)
    compile_native(out / "megatron_synth/data/shards")
    commit = git_state(ROOT / "megatron_synth")
    (out / COMMIT_FILE.relative_to(COMMIT_FILE.parents[1])).write_text(json.dumps(commit) + "\n")

    requires = [Requirement(text) for text in _dependencies()]
    carried = needed_by([one.name for one in requires if normalized(one.name) not in map(normalized, NOT_NEEDED)])
    carried = (carried | needed_by(FOR_TESTS)) - needed_by(PRESENT) - needed_by(["huggingface_hub"]) | {"tqdm", "packaging"}
    # torch has these of its own, and they are also needed by what is carried
    carried |= {"pyyaml", "typing-extensions"}
    for name in sorted(carried):
        copy_package(name, out / "site")
    strip(out / "site")
    script = out / "start.sh"
    script.write_text(START.format(python="{}.{}".format(*sys.version_info), version=tuple(sys.version_info[:2])))
    script.chmod(0o755)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if archive is not None:
        more = archive.stat().st_size
        if size + more > LIMIT:
            print(f"{archive.name} is left out: {(size + more) / 2**20:.0f} MiB with it, {LIMIT / 2**20:.0f} are allowed")
        else:
            assert tarfile.is_tarfile(archive), f"{archive} is no archive"
            shutil.copy(archive, out)
            size += more
    return size


def _dependencies() -> list[str]:
    import tomllib

    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--te", type=Path, metavar="FILE", help="a .tar.xz of a site folder with TransformerEngine")
    options = parser.parse_args()
    size = make(options.out, options.te)
    print(f"{options.out}: {size / 2**20:.1f} MiB, Python {sys.version_info[0]}.{sys.version_info[1]}; start.sh says how")
    if size > LIMIT:
        print(f"too large: {LIMIT / 2**20:.0f} MiB are allowed")
    return int(size > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
