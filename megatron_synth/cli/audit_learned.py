"""The part of `mix audit` that counts learned tokens again: those whose labels were in the loss, by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_synth.config.schema import Config
from megatron_synth.core.log import show
from megatron_synth.data.loading.recount import learned_labels
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.data.mixing.ledger import EarlierLabels
from megatron_synth.train.checkpoint import files
from megatron_synth.train.checkpoint.branch import Trunk
from megatron_synth.train.record import metrics
from megatron_synth.train.record.shapes import LedgerInfo

Difference = tuple[str, str, str, str, str]
"""File, place in it, name, planned, recorded."""


class Recorded(NamedTuple):
    """Learned tokens by source that a file tells for its number of samples."""

    file: str
    samples: int
    labels: Mapping[str, int]
    earlier: EarlierLabels | None
    """What was counted under other settings, and is taken as it is."""
    eod_mask_loss: bool
    """Of the start that wrote it."""
    tokens: int | None = None
    """Their sum, where the file tells it."""

    @property
    def part(self) -> tuple[int, bool, int]:
        """What can be counted again: first sample, `eod_mask_loss`, and the sample after the last."""
        return (0 if self.earlier is None else self.earlier["samples"]), self.eod_mask_loss, self.samples


def recorded_in(
    config: Config, ledger: LedgerInfo, file: Path, checkpoints: Sequence[tuple[Path, files.SavedState]]
) -> list[Recorded]:
    """What ledger.json and checkpoints tell of learned tokens, without those that do not.

    Args:
        config: of the run's newest start.
        ledger: content of ledger.json.
        file: where it was read.
        checkpoints: trainer.json of each, and its content.
    """
    found = []
    # ledger.json is written with a checkpoint: a start that has not saved yet may have other settings
    masks = {state["samples"]: _masks_ends(state, config) for _, state in checkpoints}
    if "learned" in ledger:
        told, masked = ledger["learned"], masks.get(ledger["samples"], config.data.eod_mask_loss)
        found.append(Recorded(file.name, ledger["samples"], told["sources"], told.get("earlier"), masked, told["tokens"]))
    for place, state in checkpoints:
        if state.get("labels"):
            name = f"{place.parent.name}/{place.name}"
            masked = masks[state["samples"]]
            found.append(Recorded(name, state["samples"], state["labels"], state.get("labels_earlier"), masked))
    return found


def _masks_ends(state: files.SavedState, config: Config) -> bool:
    """data.eod_mask_loss of the start that saved a checkpoint."""
    data = state.get("config", {}).get("data")
    return bool(data.get("eod_mask_loss", False)) if isinstance(data, dict) else config.data.eod_mask_loss


def skipped_ranges(
    records: Sequence[metrics.Record], window_length: int, trunk: Trunk | None = None
) -> list[tuple[int, int]] | None:
    """[begin, end) in samples of the steps that the records call skipped, in order; None where they do not tell.

    records: of all steps of a run, or of a branch after its trunk, whose own skipped steps are not among them.
    """
    before, skipped = (0, 0) if trunk is None else (trunk.samples, trunk.skipped)
    found = []
    for record in records:
        tokens, now = record.get(metrics.TOKENS), record.get(metrics.SKIPPED)
        if not isinstance(tokens, int) or not isinstance(now, int):
            return None
        end = tokens // window_length
        if now > skipped:
            found.append((before, end))
        before, skipped = end, now
    return found


def audit_learned(
    config: Config, data: RunData, run_files: Sequence[Recorded], records: Sequence[metrics.Record], trunk: Trunk | None
) -> list[Difference]:
    """What files tell of learned tokens that is not so by the data, and print what was counted, or why it was not.

    Args:
        config: of the run.
        data: its sources and plan.
        run_files: what ledger.json and checkpoints tell.
        records: of the steps.
        trunk: of a branch.

    Raises:
        UserError: a mask cannot be read.
    """
    plan, length = data.plan, config.window_length
    if not run_files:
        if any(source.masked for source in data.sources):
            show("learned tokens: not recorded by this run, whose version did not count them; not compared")
        return []
    skipped = skipped_ranges(records, length, trunk)
    # beyond the last record nothing tells which steps were skipped, and a damaged number is not counted to
    told = [tokens for record in records if isinstance(tokens := record.get(metrics.TOKENS), int)]
    reached = max([0 if trunk is None else trunk.samples, *(tokens // length for tokens in told[-1:])])
    counted = 0
    totals: dict[tuple[int, bool, int], dict[str, int]] = {}
    done: tuple[int, bool, int] | None = None
    for part in sorted({one.part for one in run_files}):
        start, masked, end = part
        of_trunk = trunk is not None and trunk.skipped > 0 and start < trunk.samples
        beyond = end < start or end > reached or (plan.samples is not None and end > plan.samples)
        if skipped is None or of_trunk or beyond:
            continue
        # files of the same settings are counted in one pass, from one to the next
        begin, total = (done[2], totals[done]) if done is not None and done[:2] == part[:2] else (start, {})
        ranges = _without(begin, end, skipped)
        labels = learned_labels(plan, data.sources, ranges, length, eod_mask_loss=masked).tolist()
        totals[part] = {name: total.get(name, 0) + more for name, more in zip(plan.names, labels, strict=True)}
        counted += end - begin
        done = part
    found: list[Difference] = []
    for one in run_files:
        due = totals.get(one.part)
        if due is None:
            why = "its number of samples is not of the plan, or metrics.jsonl ends before"
            if skipped is None:
                why = "metrics.jsonl does not tell which steps were skipped"
            elif trunk is not None and trunk.skipped:
                why = "nothing tells which steps of the trunk were skipped"
            show(f"learned tokens of {one.file}: not compared: {why}")
            continue
        before = one.earlier["sources"] if one.earlier else {}
        own = []
        for name in dict.fromkeys([*plan.names, *before, *one.labels]):
            expected, recorded = due.get(name, 0) + before.get(name, 0), one.labels.get(name, 0)
            if expected != recorded:
                own.append((one.file, name, "learned", str(expected), str(recorded)))
        of_all = sum(one.labels.values())
        if not own and one.tokens is not None and one.tokens != of_all:
            own = [(one.file, "learned", "tokens", str(of_all), str(one.tokens))]
        found += own
    if totals:
        show(f"counted learned tokens of {counted:,} samples again, from masks and indexes: those of {len(totals)} records")
    return found


def _without(begin: int, end: int, holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """[begin, end) without `holes`, which ascend."""
    found = []
    for first, after in holes:
        if after > begin and first < end:
            if first > begin:
                found.append((begin, first))
            begin = max(begin, after)
    return [*found, (begin, end)] if begin < end else found
