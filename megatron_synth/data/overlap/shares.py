"""Duplicates in shares: each share reads its own shards of all sources once, and what all have gathered is then compared.

The folder of the work has a folder for each share that is done, under its final name only when it is whole. A share that was
cut off is done again. What is compared, and so the report, is the same for any number of shares.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.share import Share
from megatron_synth.data.overlap.minhash import Duplicates, Settings, gather, join
from megatron_synth.data.overlap.sources import Sources

PLAN = "plan.json"
MOST_PLAN_BYTES = 2**16


def do_share(folders: Sequence[Path], settings: Settings, share: Share, work: Path) -> bool:
    """Gather what is to be compared of a share; False: that was done before.

    Raises:
        UserError: the work folder holds other work, or a source cannot be read.
    """
    return _gathered(Sources(folders), settings, share, work)


def finish(folders: Sequence[Path], settings: Settings, work: Path) -> Duplicates:
    """Do the shares that are lacking, of as many as those that are there were cut into, and compare all.

    Raises:
        UserError: as `do_share`; there is no share, or they are of different numbers.
    """
    sources = Sources(folders)
    there = [Share.of_folder(path.name) for path in work.glob("share-*") if path.is_dir()]
    numbers = sorted({share.of for share in there if share is not None})
    if len(numbers) != 1:
        found = ", ".join(map(str, numbers)) or "none"
        raise UserError(
            f"{work}: expected shares of one number, found {found}; do them with --share, or remove those of another"
        )
    shares = [Share(number, numbers[0]) for number in range(numbers[0])]
    for share in shares:
        _gathered(sources, settings, share, work)
    with tempfile.TemporaryDirectory(prefix=".joining.", dir=work) as temporary:
        return join(sources, settings, [work / share.folder for share in shares], Path(temporary))


def _gathered(sources: Sources, settings: Settings, share: Share, work: Path) -> bool:
    plan = {"sources": sources.digest, **asdict(settings)}
    target = work / share.folder
    if target.is_dir():
        if _plan_of(target) != plan:
            raise UserError(
                f"{target / PLAN}: of other sources or settings (--shingle, --threshold, --ngram, --part-mib); remove {work}, "
                "or give another --work"
            )
        return False
    work.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{share.folder}.", dir=work))
    try:
        gather(sources, settings, share, partial)
        write_json(partial / PLAN, plan)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # another process has done it meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _plan_of(folder: Path) -> object:
    try:
        with open(folder / PLAN, "rb") as file:
            return json.loads(file.read(MOST_PLAN_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / PLAN}: {error}; remove the folder, and do its share again") from None
