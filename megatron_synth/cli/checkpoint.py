"""`megatron-synth checkpoint`: which checkpoints a run has, whether they are sound, which may go."""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from pathlib import Path

from megatron_synth.cli.interrupts import interruptible
from megatron_synth.cli.options.types import count, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.lock import Lock, folder_for
from megatron_synth.core.log import gib, human, show, table
from megatron_synth.storage.remote import is_remote
from megatron_synth.train.checkpoint import branch, fetched, files
from megatron_synth.train.record.run_lock import LOCK

EXIT_DAMAGED = 1
_READERS = 4
_LONGEST = 1000
"""Characters of an option."""
_MOST = 10**12
"""Of a step, and of the weights together as whole numbers: their products with values of weights are exact in fp64."""


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(prog="megatron-synth checkpoint", description="Look after the checkpoints of a run.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    ls = verbs.add_parser("ls", help="step, size, samples and state of each; sizes are compared, content is not read")
    verify = verbs.add_parser("verify", help="read every file and compare its checksum; exit code 1 if one is damaged")
    prune = verbs.add_parser("prune", help="remove old checkpoints; the newest and that to resume always stay")
    for verb in (ls, verify, prune):
        verb.add_argument("run", type=on_disk, help="run directory, or its checkpoints folder")
    merge = verbs.add_parser("merge", help="the mean of the weights of several checkpoints, for eval, convert and init_from")
    merge.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, URL, or either with @STEP; of one tokenizer and model"
    )
    merge.add_argument("--steps", type=_steps, help="800,900,1000: these of each run; default: the newest")
    merge.add_argument("--weights", type=_weights, help="1,1,2: shares, one per checkpoint; default: equal")
    merge.add_argument("--out", type=on_disk, required=True, help="new folder")
    fetch = verbs.add_parser("fetch", help="make a run directory of a run in a bucket, each file held against its checksum")
    fetch.add_argument("url", metavar="URL[@STEP]", help="what checkpoint.upload_to names; default: its newest sound step")
    fetch.add_argument("folder", type=on_disk, help="new folder, or run directory of the same run")
    verify.add_argument("step", type=int, nargs="?", help="this one alone; default: all")
    prune.add_argument(
        "--keep", type=count, required=True, metavar="N", help="keep the N newest sound ones, which are read for it"
    )
    prune.add_argument("--every", type=count, metavar="K", help="keep also those whose step is a multiple of K")
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed")
    return parser


def main(argv: list[str]) -> int:
    """Run `checkpoint ls`, `verify`, `prune`, `merge` or `fetch` and return the exit code; 1: `verify` found damage."""
    arguments = parser().parse_args(argv)
    if arguments.verb == "merge":
        with interruptible(f"{arguments.out} was not written; the same command starts again"):
            return _merge(arguments.runs, arguments.steps, arguments.weights, arguments.out)
    if arguments.verb == "fetch":
        return _fetch(arguments.url, arguments.folder)
    root = files.root_of(arguments.run)
    found = files.all_of(root)
    if not found:
        raise UserError(f"{arguments.run}: expected a run directory with checkpoints, found none in {root}")
    if arguments.verb == "ls":
        show(_listing(root, found))
        return EXIT_OK
    if arguments.verb == "verify":
        return _verify(root, found, arguments.step)
    if arguments.dry_run:
        _prune(root, found, arguments.keep, arguments.every, dry_run=True)
        return EXIT_OK
    run = root.parent if root.name == files.FOLDER else root
    with Lock(run / LOCK, "checkpoint prune"):  # who trains there saves, resumes from what is there, and cleans up, too
        _prune(root, files.all_of(root), arguments.keep, arguments.every, dry_run=False)
    return EXIT_OK


def _steps(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < len(str(_MOST)) for part in parts):
        raise argparse.ArgumentTypeError(f"expected steps such as 800,900,1000, found '{text[:_LONGEST]}'")
    return [int(part) for part in parts]


def _weights(text: str) -> list[Fraction]:
    shown = text[:_LONGEST]
    try:
        if len(text) > _LONGEST or "e" in text.lower():  # an exponent can make a number of any length
            raise ValueError
        found = [Fraction(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,1,2 or 1/3,2/3 or 0.25,0.75, found '{shown}'") from None
    if min(found) < 0 or not any(found):
        raise argparse.ArgumentTypeError(f"expected numbers from 0, at least one of them above it, found '{shown}'")
    if sum(found) * math.lcm(*(weight.denominator for weight in found)) > _MOST:
        raise argparse.ArgumentTypeError(f"in whole numbers they are together more than {_MOST}: round '{shown}'")
    return found


def _chosen(runs: list[str], steps: list[int] | None) -> list[Path]:
    """The checkpoints that `merge` is asked for, in order.

    Raises:
        UserError: one is not there.
    """
    found = []
    for text in runs:
        if is_remote(text):
            url, step = fetched.split(text)
            named: list[int | None] = [step] if steps is None else [*steps]
            found += [files.candidates(fetched.local(url if one is None else f"{url}@{one}"))[0] for one in named]
            continue
        if steps is None and "@" in text and not Path(text).exists():
            path, step = branch.split(text, "RUN")
            asked: list[int] | None = [step]
        else:
            path, asked = Path(text), steps
        candidates = files.candidates(path)
        if asked is None:
            found += candidates[:1]
        by_step = {files.step_of(one): one for one in files.all_of(files.root_of(path))}
        for step in asked or ():
            if step not in by_step:
                known = ", ".join(map(str, sorted(by_step))) or "none"
                raise UserError(f"{path}: there is no checkpoint of step {step}; there are {known}")
            found.append(by_step[step])
        if not candidates:
            raise UserError(f"{path}: expected a run directory with checkpoints, found none")
    return found


def _merge(runs: list[str], steps: list[int] | None, weights: list[Fraction] | None, out: Path) -> int:
    chosen = _chosen(runs, steps)
    if weights is not None and len(weights) != len(chosen):
        raise UserError(f"--weights: {len(weights)} for {len(chosen)} checkpoints ({', '.join(map(str, chosen))})")
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout

    with process_group(Layout.single(), seed=0):
        from megatron_synth.train.checkpoint.merge import Part, merge

        made = merge([Part(*pair) for pair in zip(chosen, weights or [Fraction(1)] * len(chosen), strict=True)], out)
    show(f"{len(chosen)} checkpoints -> {made.checkpoint}: {human(made.parameters)} parameters")
    show(f"use it: checkpoint.init_from={out}, megatron-synth eval {out}, megatron-synth convert to-hf {out} FOLDER")
    return EXIT_OK


def _fetch(url: str, folder: Path) -> int:
    if not is_remote(url):
        raise UserError(f"{url}: expected a URL, such as s3://bucket/runs/a or s3://bucket/runs/a@900")
    with folder_for(folder), Lock(folder / LOCK, "checkpoint fetch"):
        checkpoint = fetched.fetch_into(url, folder)
    show(f"{folder} is a run directory, its checkpoint {checkpoint.name} is sound")
    return EXIT_OK


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())


def _state(checkpoint: Path) -> str:
    faults = files.faults(checkpoint, checksums=False)
    if faults:
        return _damage(faults)
    return "sizes right" if (checkpoint / files.MANIFEST).is_file() else "without a manifest"


def _damage(faults: list[str]) -> str:
    return f"damaged: {faults[0]}" + (f" and {len(faults) - 1} more" if len(faults) > 1 else "")


def _listing(root: Path, found: list[Path]) -> str:
    resumed = files.candidates(root)[0]
    rows: list[tuple[str, ...]] = [("checkpoint", "samples", "files", "GiB", "written (UTC)", "state")]
    for checkpoint in found:
        try:
            samples = str(files.STATE.read(checkpoint / files.TRAINER)["samples"])
        except UserError:
            samples = "?"
        written = datetime.fromtimestamp(checkpoint.stat().st_mtime, UTC).isoformat(" ", "seconds")[:19]
        count = sum(path.is_file() for path in checkpoint.iterdir())
        state = _state(checkpoint) + (", resumed next" if checkpoint == resumed else "")
        rows.append((checkpoint.name, samples, str(count), gib(_size(checkpoint)), written, state))
    unfinished = sorted(path.name for path in root.glob(f"step_*{files.TEMPORARY}"))
    notes = [f"  {name}: being written, or left by a run that died; the next start removes it" for name in unfinished]
    return "\n".join([table(rows), *notes])


def _verify(root: Path, found: list[Path], step: int | None) -> int:
    if step is not None:
        chosen = [checkpoint for checkpoint in found if files.step_of(checkpoint) == step]
        if not chosen:
            steps = ", ".join(str(files.step_of(checkpoint)) for checkpoint in found)
            raise UserError(f"{root}: there is no checkpoint of step {step}; there are {steps}")
        found = chosen
    damaged = 0
    for checkpoint in found:
        faults = _faults(checkpoint)
        damaged += bool(faults)
        if faults:
            show("\n".join([f"{checkpoint.name}: damaged", *(f"  {fault}" for fault in faults)]))
        elif (checkpoint / files.MANIFEST).is_file():
            show(f"{checkpoint.name}: sound, {gib(_size(checkpoint))} GiB read")
        else:
            show(f"{checkpoint.name}: made before manifests; its files are there, their content cannot be checked")
    return EXIT_DAMAGED if damaged else EXIT_OK


def _faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, every file read."""
    # files are read side by side: one reader does not fill a parallel file system
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(partial(_part_faults, checkpoint), range(_READERS))
        return sorted({fault for part in parts for fault in part})


def _part_faults(checkpoint: Path, part: int) -> list[str]:
    return files.faults(checkpoint, checksums=True, part=part, parts=_READERS)


def _prune(root: Path, found: list[Path], keep: int, every: int | None, *, dry_run: bool) -> None:
    """Remove what may go. Those kept are read first; a damaged one does not count, and is left for someone to look at.

    Raises:
        UserError: none is sound, so that nothing may go.
    """
    resumed = files.candidates(root)[0]
    damaged: dict[Path, list[str]] = {}
    sound: list[Path] = []
    for checkpoint in reversed(found):
        # of those that may go, sizes tell whether someone should look at them
        read = len({one.resolve() for one in sound}) < keep
        faults = _faults(checkpoint) if read else files.faults(checkpoint, checksums=False)
        if faults:
            damaged[checkpoint] = faults
        else:
            sound.append(checkpoint)
    if not sound:
        raise UserError(f"{root}: no checkpoint there is sound: nothing was removed\n{_left(damaged)}")
    gone = [one for one in files.removable(sound, files.step_of(sound[0]), keep, every) if one != resumed]
    freed = 0
    for checkpoint in gone:
        linked = checkpoint.is_symlink()
        freed += 0 if linked else _size(checkpoint)
        show(f"{'would remove' if dry_run else 'removed'} {checkpoint}{' (the link, not what it points to)' if linked else ''}")
        if not dry_run:
            files.remove(checkpoint)
    if damaged:
        show(_left(damaged))
    left = len(found) - len(gone)
    show(f"{gib(freed)} GiB {'would be' if dry_run else 'were'} freed, {left} checkpoint{'' if left == 1 else 's'} left")


def _left(damaged: dict[Path, list[str]]) -> str:
    return "\n".join(f"left {checkpoint}: {_damage(faults)}" for checkpoint, faults in damaged.items())
