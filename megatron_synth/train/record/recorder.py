"""From steps to records: sums stay on the device until a log step, then one reduction serves all steps since the last."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_synth.config.errors import RankError, TrainingFailed, UserError
from megatron_synth.config.schema import Config
from megatron_synth.core.log import say
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.data.mixing.ledger import Ledger
from megatron_synth.data.mixing.skips import Skips
from megatron_synth.data.shards import places
from megatron_synth.estimate.flops import flops_per_token
from megatron_synth.estimate.hardware import mfu
from megatron_synth.parallel.groups import Ranks
from megatron_synth.parallel.placement import node_name
from megatron_synth.train.batch import LABELS, LOSS, SAMPLES, Z_LOSS
from megatron_synth.train.checkpoint import files
from megatron_synth.train.record import metrics
from megatron_synth.train.record.anomalies import Notes
from megatron_synth.train.record.nodes import Nodes
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.record.times import WAITS, Wait
from megatron_synth.train.record.wandb import Tracker
from megatron_synth.train.spikes import Row, Rows

if TYPE_CHECKING:  # it imports megatron-core, which must find the device prepared
    from megatron_synth.train.step import StepResult


_NAMED = 4
"""Rows that the note of an odd step names."""
_LABELS = 0.25
"""Part of a row's labels that must count for it to be held against others."""

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class Recorder:
    """Collects steps on all ranks; rank 0 writes metrics.jsonl, the console line and the tracker.

    The ledger is fed from what the loss was computed on, window by window, not from what was planned.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        ledger: Ledger,
        run_dir: RunDir,
        tracker: Tracker | None,
        ranks: Ranks,
        *,
        step: int,
        skipped: int,
        consecutive: int = 0,
        noted: Sequence[float] = (),
        waited: Mapping[Wait, float],
    ):
        """skipped, consecutive: steps skipped since step 0, and just before. noted: losses of the last steps.

        waited: what this rank waits for, in seconds, as it adds up.
        """
        self._config, self._data, self._plan, self._ledger = config, data, data.plan, ledger
        self._run_dir, self._tracker, self._ranks = run_dir, tracker, ranks
        self._flops_per_token = flops_per_token(config.model, config.train.sequence_length, data.vocab_size)
        self._device_name = run_dir.info["device"]
        self._memory_total = (
            torch.cuda.get_device_properties(ranks.device).total_memory / 2**30 if ranks.device.type == "cuda" else None
        )
        hosts: list[str] = [""] * ranks.world_size
        torch.distributed.all_gather_object(hosts, node_name())
        self._notes = Notes(config, run_dir, hosts, noted)
        self._nodes = Nodes(run_dir.path, hosts) if ranks.rank == 0 else None
        self._waited = waited
        sigmas = config.log.loss_spike_sigmas
        self._rows = None if sigmas is None else Rows(sigmas, len(data.plan.names))
        self._file = metrics.MetricsFile(run_dir.metrics)
        self._times = metrics.RunningWindow()
        self._pending: list[tuple[metrics.Record, StepResult]] = []
        self._held: list[metrics.Record] = []
        self._newest: metrics.Record | None = None
        self._unamended: metrics.Record | None = None
        self._ends: list[int] = []
        self._own_s: list[float] = []
        self._first_step = step
        self.consecutive = consecutive
        """Steps skipped just before."""
        self._row: list[int] = []
        """Samples consumed after each of these, and before the first, as far as this start has seen them."""
        self.skipped = skipped
        """Steps skipped since step 0."""

    def start(self) -> None:
        """Begin writing after the step that the run is at."""
        if self._ranks.rank == 0:
            kept = self._file.truncate_after(self._first_step)
            if kept and kept[-1][metrics.STEP] == self._first_step:
                self._newest = kept[-1]
            if self._tracker is not None:
                self._tracker.replay(kept)

    @property
    def lacks_evaluation(self) -> bool:
        """The newest record is known and tells of no evaluation, or there is none before the first step. Rank 0."""
        if self._newest is None:
            return self._first_step == 0
        return not metrics.has_eval(self._newest)

    @property
    def noted(self) -> list[float]:
        """Losses of the last steps, by which the next are judged."""
        return self._notes.losses

    @property
    def in_trouble(self) -> bool:
        """So many steps in a row were skipped that the run must stop; the next flush raises."""
        return self.consecutive >= self._config.train.max_consecutive_skips

    def add(self, step: int, samples: int, result: StepResult, lr: float, *, step_s: float, data_s: float) -> None:
        """Take in a finished step, after which `samples` are consumed. No wait for the device, nothing sent."""
        self.consecutive = self.consecutive + 1 if result.skipped else 0
        consumed = self._config.samples_of_step(step - 1)
        self._row = [*(self._row or [samples - consumed]), samples] if result.skipped else []
        self.skipped += result.skipped
        self._times.add(step_s)
        tokens_per_s = consumed * self._config.window_length / step_s / self._ranks.world_size
        flops_per_s = tokens_per_s * self._flops_per_token
        record: metrics.Record = {
            metrics.STEP: step,
            metrics.LOSS: None,  # its place in the record; known at the flush
            metrics.GRAD_NORM: result.grad_norm,
            metrics.LR: lr,
            metrics.SKIPPED: self.skipped,
            metrics.TOKENS_PER_SEC: tokens_per_s,
            metrics.TFLOPS: flops_per_s / 1e12,
            metrics.MFU: mfu(flops_per_s, self._device_name),
            metrics.STEP_S: step_s,
            metrics.DATA_PCT: 100 * data_s / step_s,
        }
        self._pending.append((record, result))
        self._ends.append(samples)
        self._own_s.append(result.own_s + data_s)

    def flush(self, *, shown: bool = False) -> None:
        """Reduce and write the steps since the last flush; `shown` prints the newest. Called by all ranks.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        if self._pending:
            sums = torch.stack([result.sums for _, result in self._pending])  # [steps, 4, K]
            odd = self._odd_rows()
            # one reduction for all: what a rank says of itself is a place of its own in a table of zeros
            said = [sum(self._own_s), _peak_memory_gib(self._ranks.device), sum(map(len, odd)), *map(self._waited.get, WAITS)]
            clipped = self._pending[-1][1].clipped
            said.append(0.0 if clipped is None else float(clipped))
            own = torch.zeros((len(said), self._ranks.world_size), dtype=torch.float64)
            own[:, self._ranks.rank] = torch.tensor(said, dtype=torch.float64)
            parts = [sums.flatten(), own.flatten().to(sums.device)]
            parts += [result.by_value.flatten() for _, result in self._pending if result.by_value is not None]
            both = torch.cat(parts)
            torch.distributed.all_reduce(both)
            of_sums, of_ranks, by_value = both.cpu().split(
                [sums.numel(), own.numel(), both.numel() - sums.numel() - own.numel()]
            )
            own_s, memory, odd_rows, *waits, heads = of_ranks.view(len(said), -1).tolist()
            records = [record for record, _ in self._pending]
            reduced = of_sums.view(sums.shape).tolist()
            if self._data.values is not None:
                for record, (losses, labels) in zip(records, by_value.view(len(records), 2, -1).tolist(), strict=True):
                    record |= metrics.losses_by(metrics.LOSS_BY, self._data.values.names, losses, labels)
            for place, ((record, result), end, of_step) in enumerate(zip(self._pending, self._ends, reduced, strict=True)):
                self._complete(record, of_step, max(memory), learned=not result.skipped)
                what = self._notes.look(record, result.why)  # alike on all ranks
                if what is not None:
                    odd[place] = []  # its rows are ranked there
                    self._tell(record, what, dict(zip(self._plan.names, map(int, of_step[SAMPLES]), strict=True)), end, result)
            if clipped is not None:
                records[-1][metrics.CLIPPED] = int(sum(heads))
            if any(odd_rows):
                self._tell_rows(records, odd)
            if self._nodes is not None:
                self._notes.times(records[-1][metrics.STEP], [seconds / len(records) for seconds in own_s])
                self._nodes.add(len(records), own_s, dict(zip(WAITS, waits, strict=True)))
            self._pending, self._ends, self._own_s = [], [], []
            self._write(records)
            if shown:
                self._show(records[-1])
        if self.in_trouble:
            raise self._trouble()

    def _trouble(self) -> UserError:
        """Why the run cannot go on, and where it can be started again."""
        if self._config.train.skip is None:
            return TrainingFailed(
                f"{self.consecutive} steps in a row had a loss or gradient that was not finite "
                f"(train.max_consecutive_skips); the weights are those before them. The last checkpoint is in "
                f"{self._run_dir.checkpoints}. Look at the samples of these steps, which events.log names, or lower optim.lr"
            )
        first, last = self._plan.skips.number(self._row[0]), self._plan.skips.end(self._row[-1]) - 1
        ranges = [[a, b] for a, b in Skips([*self._config.data.skip, (first, last)]).ranges]
        before = [
            f"{self._run_dir.path}@{files.step_of(one)}"
            for one in files.all_of(self._run_dir.checkpoints)
            if files.STATE.read(one / files.TRAINER)["samples"] <= self._row[0]
        ]
        where = f"checkpoint.branch_from={before[-1]} " if before else "from the beginning, with "
        return TrainingFailed(
            f"{self.consecutive} steps in a row were skipped (train.max_consecutive_skips): their losses or gradient norms are "
            "not finite, or stand out from those before (train.skip). Go on from before them without their samples, in a run "
            f"directory of its own: {where}data.skip='{ranges}'. If they stand out again, what went wrong lies before them: "
            "take an earlier checkpoint, or a lower optim.lr"
        )

    def _odd_rows(self) -> list[list[Row]]:
        """Of each pending step, the rows of this rank that stand out from those of their source. Called by all ranks."""
        odd: list[list[Row]] = [[] for _ in self._pending]
        if self._rows is None:
            return odd
        for found, (_, result) in zip(odd, self._pending, strict=True):
            rows = self._of_rows(result)
            if rows is None or result.skipped:
                continue
            losses, labels, samples = rows
            enough = labels >= _LABELS * self._config.window_length  # a mean over a few labels says little
            source_ids, *_ = self._plan.places(samples[enough])
            found += self._rows.look(losses[enough], source_ids, samples[enough])
        return odd

    def _of_rows(self, result: StepResult) -> tuple[Float64, Float64, Int64] | None:
        """Of this rank's rows with labels: nats per label, labels and sample; None: it does not report the loss.

        Called by all ranks that share its rows.
        """
        if result.row_losses is None or result.rows is None:
            return None
        sums = result.row_losses
        if self._config.parallel.context_parallel_size > 1:  # each has the labels of its own part of the row
            from megatron.core import parallel_state

            sums = sums.clone()
            torch.distributed.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        losses, labels = sums.cpu().numpy().T
        some = labels > 0
        return losses[some] / labels[some], labels[some], result.rows[some]

    def _tell_rows(self, records: Sequence[metrics.Record], odd: Sequence[Sequence[Row]]) -> None:
        """Note rows that stand out in steps that do not. Called by all ranks."""
        own = {record[metrics.STEP]: rows for record, rows in zip(records, odd, strict=True) if rows}
        found: list[Any] = [None] * self._ranks.world_size
        torch.distributed.all_gather_object(found, own)
        if self._ranks.rank:
            return
        for step in sorted({step for part in found for step in part}):
            rows = sorted(
                {row.sample: row for part in found for row in part.get(step, ())}.values(), key=lambda row: row.sample
            )
            self._notes.tell_rows(step, len(rows), rows[0], [self._row_text((row.loss, row.sample)) for row in rows[:_NAMED]])

    def _tell(self, record: metrics.Record, what: str, rows: dict[str, int], end: int, result: StepResult) -> None:
        """Note a step that is odd, and name the rows of largest loss. Called by all ranks."""
        own: list[tuple[float, int]] = []
        rows_of_rank = self._of_rows(result)
        if rows_of_rank is not None:
            losses, _, samples_of_rank = rows_of_rank
            own = sorted(zip(losses.tolist(), samples_of_rank.tolist(), strict=True), key=_largest_first)[:_NAMED]
        found: list[Any] = [None] * self._ranks.world_size
        torch.distributed.all_gather_object(found, own)
        if self._ranks.rank:
            return
        worst = sorted({sample: (loss, sample) for part in found for loss, sample in part}.values(), key=_largest_first)
        first = self._plan.skips.number(end - sum(rows.values()))
        self._notes.tell(record, what, rows, (first, self._plan.skips.end(end) - 1), list(map(self._row_text, worst[:_NAMED])))

    def _row_text(self, row: tuple[float, int]) -> str:
        """A window by its loss, source, file and documents."""
        loss, sample = row
        [source_id], [window], [offset] = (part.tolist() for part in self._plan.places([sample]))
        source, length = self._data.sources[source_id], self._config.window_length
        begin = window * length + offset
        try:
            where = places.described(source, begin, begin + length + 1)
        except (UserError, OSError) as error:  # the file may be what is wrong
            where = f"{source.path} ({error})"
        return f"sample {sample} {loss:.4g} ({source.name}: {where})"

    def finish(self) -> None:
        """The run ends: nothing may be left unwritten. Rank 0.

        Raises:
            RankError: metrics.jsonl could not be written.
        """
        if self._nodes is not None:
            self._nodes.write()
        left = [*filter(None, [self._unamended]), *self._held]
        if left:
            first, last = (left[place][metrics.STEP] for place in (0, -1))
            raise RankError(
                f"{self._file.path}: the records of steps {first} to {last} could not be written; the checkpoint is complete. "
                "Make room; remove the last checkpoint and start the same command again to make them again"
            )

    def include(self, result: Mapping[str, Any]) -> None:
        """Add to the record of the newest step, which is not flushed yet."""
        self._pending[-1][0].update(result)

    def amend(self, result: Mapping[str, Any]) -> None:
        """Add the evaluation that followed it to the record of the newest step, which is flushed. Called by all ranks."""
        assert not self._pending
        if self._ranks.rank != 0:
            return
        if self._newest is None:  # before the first step
            self._newest = {metrics.STEP: 0, metrics.TOKENS: 0}
            self._held.append(self._newest)
        self._newest.update(result)
        if not any(record is self._newest for record in self._held):  # else it is written with these
            self._unamended = self._newest
        self._write([])
        if self._tracker is not None:
            self._tracker.log(result, self._newest[metrics.STEP], evaluation=True)
        say(metrics.format_eval({metrics.STEP: self._newest[metrics.STEP], **result}))

    def _show(self, record: metrics.Record) -> None:
        total = self._config.train.steps
        left = self._times.eta_s(total - record[metrics.STEP])
        say(metrics.format_step(record, total, eta_s=left, memory_total_gib=self._memory_total))

    def _complete(self, record: metrics.Record, sums: list[list[float]], peak_gib: float, *, learned: bool) -> None:
        """Fill in what the reduction brought, and count the samples in the ledger. sums: [4, K], see batch.py."""
        losses, labels, samples = sums[LOSS], sums[LABELS], sums[SAMPLES]
        expected = self._config.samples_of_step(record[metrics.STEP] - 1)
        assert sum(samples) == expected, f"{sum(samples)} samples in a step of {expected}"
        self._ledger.merge([int(count) for count in samples], learned=learned, labels=[int(count) for count in labels])
        number = sum(labels)  # 0 where all are masked: a mean over nothing stays None
        record[metrics.LOSS] = math.fsum(losses) / number if number else None
        if self._config.train.z_loss:
            record[metrics.Z_LOSS] = math.fsum(sums[Z_LOSS]) / number if number else None
        for name, loss, count in zip(self._plan.names, losses, labels, strict=True):
            if count:
                record[metrics.SOURCE_LOSS + name] = loss / count
        record[metrics.PEAK_GIB] = peak_gib
        counted = self._ledger.to_json()
        record[metrics.TOKENS] = counted["tokens"]
        for name, source in counted["sources"].items():
            record[metrics.SHARE + name] = source["share"]
            record[metrics.EPOCH + name] = source["epochs"]

    def _write(self, records: list[metrics.Record]) -> None:
        if self._ranks.rank != 0:
            return
        self._held += records
        if records:
            self._newest = records[-1]
        try:
            if self._unamended is not None:
                self._file.replace_last(self._unamended)
                self._unamended = None
            self._file.append(self._held)
            self._held = []
        except OSError as error:
            waiting = len(self._held) + (self._unamended is not None)
            say(f"warning: {self._file.path}: {error}; {waiting} records wait in memory until it can be written")
        if self._tracker is not None:
            for record in records:
                self._tracker.log(record, record[metrics.STEP])


def _largest_first(row: tuple[float, int]) -> tuple[float, int]:
    """Orders rows; what is no number comes first of all."""
    loss, sample = row
    return (-math.inf if math.isnan(loss) else -loss), sample


def _peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process ever held: on the device, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
