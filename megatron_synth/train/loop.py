"""The training loop: read this first.

    plan -> data -> processes -> model -> resume -> steps -> save, evaluate, report

Everything that a user can get wrong is checked before the processes are joined.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, UserError
from megatron_synth.config.schema import Config, Progress
from megatron_synth.core import exit_record
from megatron_synth.core.log import human, say
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.data.mixing.ledger import Ledger
from megatron_synth.data.shards import native
from megatron_synth.estimate.flops import count_parameters, flops_per_token
from megatron_synth.model import kernels
from megatron_synth.model.run_plan import RunPlan, decide
from megatron_synth.parallel.groups import Ranks, on_main, on_main_only, process_group
from megatron_synth.parallel.plan import Layout
from megatron_synth.train.batch import TensorBatch, part_of, prefetcher_of, reading, to_device
from megatron_synth.train.checkpoint import branch, files
from megatron_synth.train.checkpoint.branch import Trunk
from megatron_synth.train.checkpoint.bucket import Bucket, Uploader
from megatron_synth.train.checkpoint.files import check_writable, clear_unfinished
from megatron_synth.train.garbage import ManualCollection
from megatron_synth.train.record import metrics
from megatron_synth.train.record.recorder import Recorder
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.record.run_lock import RunLock
from megatron_synth.train.record.times import Times
from megatron_synth.train.record.wandb import Tracker
from megatron_synth.train.schedule import learning_rate
from megatron_synth.train.signals import StopRequest, listen
from megatron_synth.train.watchdog import Watch

if TYPE_CHECKING:  # megatron-core takes seconds to import and must find the device prepared
    from megatron_synth.train.checkpoint.start import Start

_LAST_WRITE_S = 600.0
"""How long a run that ends with an error waits for the checkpoint that is being written."""
_UPLOAD_WORD_S = 5.0
"""How often ranks that wait for the last upload hear that it goes on."""


def train(config: Config, layout: Layout, data: RunData, run_path: Path, *, tensor_across_nodes: bool = False) -> int:
    """Train until the last step or a stop request.

    Args:
        config: the run.
        layout: its checked plan on this world size.
        data: its opened data.
        run_path: run directory; one that holds a checkpoint is resumed.
        tensor_across_nodes: allow tensor-parallel groups that span nodes.

    Returns:
        The exit code: 0 done, 75 stopped on request.
    """
    stop = listen()
    plan = decide(config, layout)
    group = process_group(layout, config.train.seed, tensor_across_nodes=tensor_across_nodes)
    with stop.before_failing(), group as ranks, RunLock(run_path) as lock:
        kernels.check_same_on_all_ranks(plan.kernels)
        from megatron_synth.train.checkpoint.start import starting_point

        # from here on what is in the run directory is ours; all that can be refused is refused before it is changed
        on_main(ranks, lock.take)
        bucket = None if config.checkpoint.upload_to is None else Bucket(config.checkpoint.upload_to)
        if bucket is not None:
            on_main(ranks, lambda: _fetched(bucket, run_path))
        start = starting_point(config, data, run_path, branch.trunk_of(config, run_path))
        trainer = Trainer(plan, data, ranks, run_path, lock, bucket)
        with trainer.watch:
            try:
                trainer.build(start)
                with trainer.prefetcher, ManualCollection(config.train.gc_interval) as collection:
                    code = trainer.run(stop, collection)
            except UserError:  # that all ranks have met: the checkpoint in the air is worth waiting for
                trainer.writer.join(_LAST_WRITE_S)
                if trainer.uploader is not None:
                    with contextlib.suppress(UserError):  # told as a warning
                        trainer.uploader.wait(_LAST_WRITE_S)
                raise
            except RuntimeError as error:
                stop.wait_for_late()
                if layout.world_size > 1:
                    trainer.watch.explain(error)
                raise
            trainer.enter("end", slow=True)
            return code


class Trainer:
    """A run on this rank: model, optimizer, data position and record."""

    def __init__(self, plan: RunPlan, data: RunData, ranks: Ranks, run_path: Path, lock: RunLock, bucket: Bucket | None = None):
        from megatron_synth.train.checkpoint.writer import CheckpointWriter

        self.plan, self.config, self.layout, self.data, self.ranks = plan, plan.config, plan.layout, data, ranks
        config, layout = plan.config, plan.layout
        self._tokenizer = on_main(ranks, data.checked_tokenizer)
        on_main(ranks, lambda: self._check_disk(run_path))
        self.run_dir = on_main(
            ranks, lambda: RunDir.create_or_open(run_path, config, layout=layout.describe(), world_size=layout.world_size)
        )
        on_main(ranks, lambda: lock.begin(self.run_dir))
        self.times = Times(self.run_dir.path, len(self.run_dir.info["starts"]), writes=ranks.rank == 0)
        attempt = on_main(ranks, self._new_attempt)
        self.writer = CheckpointWriter(self.run_dir.checkpoints, attempt, ranks.device)
        self.uploader = None
        if bucket is not None and ranks.rank == 0:
            self.uploader = Uploader(bucket, config.checkpoint, self._warn)
        self.watch = Watch(
            self.run_dir.path / "hang",
            attempt,
            ranks.rank,
            ranks.world_size,
            hang_timeout_s=config.train.hang_timeout_s,
            lost_after_s=config.train.lost_rank_timeout_s,
            event=self.run_dir.event,
        )

    def enter(self, phase: str, step: int = 0, *, slow: bool = False) -> None:
        """Tell who watches, and who counts the time, what begins; see `Watch.enter`."""
        self.watch.enter(phase, step, slow=slow)
        self.times.enter(phase, step)

    def build(self, start: Start) -> None:
        """Model, optimizer, data position and record, as the checkpoint has them if there is one. Within `watch`."""
        from megatron_synth.model.build import build_model
        from megatron_synth.parallel.average import Average
        from megatron_synth.parallel.wrap import build_optimizer, wrap_ddp
        from megatron_synth.train.checkpoint import averages, resume
        from megatron_synth.train.health import Health
        from megatron_synth.train.step import Stepper

        config, layout, data, ranks, saved = self.config, self.layout, self.data, self.ranks, start.saved
        begun_from = start.resumed if start.branches else start.weights
        source = None if begun_from is None else files.run_of(begun_from)
        on_main(ranks, lambda: self.run_dir.keep(self._tokenizer, source))
        for text in [*(data.notes if ranks.rank == 0 else ()), *start.warnings]:  # on rank 0
            self._warn(text)
        self.chunks = wrap_ddp(build_model(self.plan, data.vocab_size), config)
        self.optimizer = build_optimizer(self.chunks, config)
        self.fp8_statistics = self.chunks[0].module.fp8_statistics
        self.precision_text = self.chunks[0].module.precision_text
        self._part = part_of(ranks, config)
        self.stepper = Stepper(config, self.chunks, self.optimizer, ranks, layout.replicas)
        self.stepper.num_values = 0 if data.values is None else len(data.values.names)
        self.health = None
        if config.log.health_interval is not None:
            self.health = Health(config, self.chunks, self.optimizer, ranks, self.stepper.gradient_copies)
        self.step = self.samples = 0
        self.branched = start.branches
        self.ledger = Ledger.of(data.plan, config.window_length)
        if any(source.masked for source in data.sources):
            self.ledger.count_labels()
        if start.trunk is not None:
            self.ledger.begin_branch(start.trunk.run_id, start.trunk.step, start.trunk.ledger)
        if saved is not None:
            assert start.resumed is not None
            resume.load(start.resumed, self.chunks, self.optimizer)
            self.step, self.samples = saved.step, saved.samples
            self.ledger.load_state_dict(saved.ledger, saved.unlearned, saved.labels, saved.labels_earlier)
            if resume.counts_labels_anew(saved, config, branches=start.branches):
                self.ledger.close_labels()
            if self.stepper.guard is not None:
                self.stepper.guard.restore(saved.window)
            self.ledger.verify(data.plan, self.samples)
            on_main(ranks, lambda: self._record_resume(saved.plan_digest, start.trunk if start.branches else None))
            on_main(ranks, lambda: self._upload_if_lacking(start))
        elif start.weights is not None:
            resume.load_weights(start.weights, self.chunks, self.optimizer)
            if config.checkpoint.init_ema:
                averages.load_average_as_weights(start.weights, self.chunks, self.optimizer)
            grown = resume.extend_vocabulary(start.weights, self.chunks, self.optimizer, config, data)
            if grown is not None:
                on_main(ranks, lambda: self.run_dir.event(grown))
                say(grown)
        if config.optim.ema_decay is not None:
            self.stepper.average = Average(self.chunks, self.optimizer, config.optim.ema_decay)
            if start.resumed is not None and not averages.load_average(start.resumed, self.chunks, self.stepper.average):
                text = f"the average of the weights begins at step {self.step}: {start.resumed} holds none"
                on_main(ranks, lambda: self.run_dir.event(text))
        self.prefetcher = prefetcher_of(config, layout, ranks, data, Progress(self.step, self.samples))
        exit_record.at_step(self.step)
        self.tracker = on_main_only(ranks, self._start_tracker)
        self.recorder = Recorder(
            config,
            data,
            self.ledger,
            self.run_dir,
            self.tracker,
            ranks,
            step=self.step,
            skipped=saved.skipped if saved else 0,
            consecutive=saved.consecutive if saved else 0,
            noted=saved.noted if saved else (),
            waited=self.times.waited,
        )

    def _new_attempt(self) -> str:
        """A word that no other start of this run has used; what earlier ones left half-written goes."""
        clear_unfinished(self.run_dir.checkpoints)
        Watch.clear(self.run_dir.path / "hang")
        return secrets.token_hex(4)

    def _warn(self, text: str) -> None:
        """Tell the console and events.log; rank 0."""
        say(f"warning: {text}")
        try:
            self.run_dir.event(f"warning: {text}")
        except OSError as error:  # the disk may be what the warning is about
            say(f"warning: {self.run_dir.path / 'events.log'}: {error}")

    def _record_resume(self, plan_digest: str, branched_from: Trunk | None) -> None:
        if branched_from is None:
            self.run_dir.record_resume(self.step)
        else:
            branched_from.save(self.run_dir.path)
            self.run_dir.event(f"branched from {branched_from.name}, run {branched_from.run_id}")
        if not self.data.is_of(plan_digest):
            mixture = f"{self.data.plan.describe()}; digest {plan_digest} -> {self.data.digest}"
            self.run_dir.event(f"mixture changed from sample {self.samples} on: {mixture}")

    def _upload_if_lacking(self, start: Start) -> None:
        """Upload the checkpoint that the run goes on from, where a start before this one did not come to it."""
        if self.uploader is not None and start.resumed is not None and not start.branches:
            self.uploader.offer_if_lacking(start.resumed)

    def _start_tracker(self) -> Tracker:
        return Tracker.start(
            self.config.log.wandb,
            self.run_dir.path,
            self.run_dir.id,
            self.config.model_dump(mode="json"),
            self.run_dir.name,
            step=self.step,
        )

    def _check_disk(self, run_path: Path) -> None:
        """Refuse to start when not even one checkpoint can be written."""
        check_writable(run_path / "checkpoints")
        parameters = count_parameters(self.config.model, self.data.vocab_size).total
        # weights, fp32 master weights and Adam's two moments
        needed = parameters * ((2 if self.config.precision.dtype == "bf16" else 4) + 12)
        existing = next(folder for folder in [run_path, *run_path.resolve().parents] if folder.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise UserError(
                f"{run_path}: {human(free)} bytes free, but one checkpoint takes about {human(needed)}; make room "
                "or choose a run directory on another disk"
            )

    def run(self, stop: StopRequest, collection: ManualCollection) -> int:
        """All remaining steps, with saves and evaluations where they are due.

        What can fail and weights do not need, an evaluation, follows the save of its step. One that failed, or gave way to a
        stop, is made when the run goes on.
        """
        steps = self.config.train.steps
        self._header()
        started_at = self.step
        saved_at = self.step if self.samples else None
        self.recorder.start()
        stop.hold()
        self._saved_time = time.monotonic()
        stopping = owing = False
        if self._evaluation_due() and on_main(self.ranks, lambda: self.recorder.lacks_evaluation):
            stopping = owing = self._evaluate(stop)
        while self.step < steps and not stopping:
            lr = learning_rate(self.step, self.config.optim, steps)
            self.enter("reading data", self.step + 1)
            observing = _due(self.step + 1, self.config.precision.fp8_log_every)
            if self.fp8_statistics is not None:
                self.fp8_statistics.observing = observing
            health = self.health if _due(self.step + 1, self.config.log.health_interval) else None
            self.stepper.health = health
            began = time.perf_counter()
            batches = self._batches()
            self.enter("step", self.step + 1)
            loaded = time.perf_counter()
            result = self.stepper.step(batches, len(self.data.plan.names), lr, lambda: stop.requested, self._save_by_time)
            ended = time.perf_counter()
            self.enter("record", self.step + 1)
            self.samples += self.config.samples_of_step(self.step)
            self.step += 1
            exit_record.at_step(self.step)
            collection.after_step(self.step)
            self.recorder.add(self.step, self.samples, result, lr, step_s=ended - began, data_s=loaded - began)
            if self.precision_text and self.step == started_at + 1:
                self.recorder.include({metrics.PRECISION: self.precision_text})
            if health is not None:
                self.recorder.include(health.observed())
            if self.fp8_statistics is not None and (observing or health is not None):
                seen = self.fp8_statistics.observed()
                self.recorder.include(seen if observing else {})
                saturated = {metrics.SATURATED + layer: share for layer, share in self.fp8_statistics.saturated.items()}
                self.recorder.include(saturated if health is not None else {})
            stopping = result.stop
            done = self.step == steps
            if done or stopping or _due(self.step, self.config.log.interval) or self.recorder.in_trouble:
                self.recorder.flush(shown=True)
            saves = _due(self.step, self.config.checkpoint.interval) or self.step in self.config.checkpoint.keep_steps
            if done or stopping or result.save or saves:
                self._save(required=done or stopping)
                saved_at = self.step
            if self._evaluation_due() and (done or not stopping):
                owing = self._evaluate(stop)
                stopping = stopping or owing
        if saved_at != self.step or not self._is_written():
            self._save(required=True)
        stopped = stopping and (self.step < steps or owing)
        self._finish(stopped, stop)
        return EXIT_STOPPED if stopped else EXIT_OK

    def _batches(self) -> list[TensorBatch]:
        # a step ends with a wait for the device: nothing reads the buffers of the last step any more
        with reading(self.layout):
            batches = self.prefetcher.step(self.samples)
        return [to_device(batch, self.ranks.device, self.config.data, part=self._part) for batch in batches]

    def _is_written(self) -> bool:
        """Wait for the save that is being written, if there is one; False: it failed."""
        from megatron_synth.train.checkpoint.writer import SaveFailed

        try:
            self.writer.outcome()
        except SaveFailed:
            return False
        return True

    def _save_by_time(self) -> bool:
        """Whether this rank's clock asks for a save; that of any rank is enough."""
        interval = self.config.checkpoint.interval_s
        return interval is not None and time.monotonic() - self._saved_time >= interval

    def _evaluation_due(self) -> bool:
        """Whether the domains are evaluated after the step that the run is at."""
        if not self.data.validation and not self.data.answers:
            return False
        if self.step == 0:
            return self.config.eval.at_start
        return self.step == self.config.train.steps or _due(self.step, self.config.eval.interval)

    def _evaluate(self, stop: StopRequest) -> bool:
        """Evaluate, unless some rank is asked to stop first: then True."""
        from megatron_synth.train.evaluate import evaluate

        self.enter("evaluation", self.step, slow=True)
        self.recorder.flush()
        result = evaluate(self.stepper, self.data, self.layout, lambda: stop.requested, self.stepper.average)
        if result is not None:
            self.recorder.amend(result)
        return result is None

    def _save(self, *, required: bool) -> None:
        """Save. A periodic save that fails is a warning, and training goes on; one that is required is waited for.

        Raises:
            UserError: a required save failed.
        """
        from megatron_synth.train.checkpoint.resume import TrainerState, trainer_file
        from megatron_synth.train.checkpoint.sharding import collect
        from megatron_synth.train.checkpoint.writer import SaveRequest

        self.enter("save", self.step, slow=True)
        self._saved_time = time.monotonic()
        self.recorder.flush()
        self.ledger.verify(self.data.plan, self.samples)
        step, ledger, began = self.step, self.ledger.to_json(), time.perf_counter()
        trainer = TrainerState(
            step=step,
            samples=self.samples,
            skipped=self.recorder.skipped,
            run_id=self.run_dir.id,
            plan_digest=self.data.digest,
            ledger=self.ledger.state_dict(),
            vocab_size=self.data.vocab_size,
            eod_id=self.data.eod_id,
            tokenizer=self.run_dir.tokenizer.name if self.run_dir.tokenizer.is_file() else None,
            tokenizer_fingerprint=self.data.tokenizer_fingerprint,
            config=self.config.model_dump(mode="json"),
            prefix_digest=self.data.prefix_digest(self.samples),
            contents=dict(self.data.contents),
            unlearned=self.ledger.unlearned,
            labels=self.ledger.labels,
            labels_earlier=self.ledger.labels_earlier,
            consecutive=self.recorder.consecutive,
            window={} if self.stepper.guard is None else self.stepper.guard.state(),
            noted=self.recorder.noted,
        )

        def committed(path: Path) -> None:
            text = f"in {time.perf_counter() - began:.1f} s"
            if not waits:
                text += f", {self.writer.blocked_s:.2f} s of them before training went on"
            try:
                self.run_dir.write_ledger(ledger)
                self.run_dir.event(f"saved {path.name} {text}")
            except OSError as error:
                say(f"warning: {self.run_dir.path}: {path.name} was saved, but not noted: {error}")
            say(f"saved {path} {text}")
            if self.uploader is not None:
                self.uploader.offer(path)

        waits = required or not self.config.checkpoint.async_save
        request = SaveRequest(
            step,
            trainer_file(trainer),
            committed,
            failed=lambda text: None if required else self._warn(f"{text}. Training goes on"),
            keep_last=self.config.checkpoint.keep_last,
            keep_every=self.config.checkpoint.keep_every,
            keep_steps=(*self.config.checkpoint.keep_steps, *(self.uploader.steps if self.uploader is not None else ())),
        )
        self.writer.begin(lambda: collect(self.chunks, self.optimizer, self.stepper.average), request)
        if required:
            self.writer.outcome()
        elif waits:
            self.writer.join()

    def _wait_for_upload(self) -> None:
        """Raises a UserError, on all ranks, where the last checkpoint could not be uploaded."""
        if self.config.checkpoint.upload_to is not None:
            done = False
            while not done:
                self.watch.enter("upload", self.step, slow=True)
                done = on_main(self.ranks, lambda: self.uploader is None or self.uploader.wait(_UPLOAD_WORD_S))

    def _finish(self, stopped: bool, stop: StopRequest) -> None:
        self._wait_for_upload()
        if self.ranks.rank == 0:
            self.recorder.finish()
            why = f"stopped on request ({stop.signal_name or 'by another rank'})" if stopped else "done"
            self.run_dir.event(f"{why} at step {self.step}")
            then = "; saved, the same command resumes" if stopped else ""
            say(f"{why} at step {self.step}{then}; run directory {self.run_dir.path}")
        if self.tracker is not None:
            self.tracker.finish(EXIT_STOPPED if stopped else EXIT_OK)

    def _header(self) -> None:
        """What this run is, before its first step."""
        config, data = self.config, self.data
        parameters = count_parameters(config.model, data.vocab_size)
        flops = flops_per_token(config.model, config.train.sequence_length, data.vocab_size)
        since = "" if not self.step else f", {'branched' if self.branched else 'resumed'} at step {self.step}"
        say(f"run {self.run_dir.id} in {self.run_dir.path}{since}")
        size = f"{human(parameters.total)} parameters ({human(parameters.non_embedding)} non-embedding)"
        convention = f"{human(flops)} FLOPs/token (full attention, head counted)"
        say(f"model {config.model.name}: {size}, {config.precision.dtype}, {convention}")
        if self.precision_text:
            say(self.precision_text)
        say(f"layout {self.layout.describe()} on {self.run_dir.info['device']}")
        for line in kernels.summary(self.plan.kernels):
            say(line)
        tokens = human(config.samples_at_end(Progress(self.step, self.samples)) * config.window_length)
        if self.precision_text and self.ranks.rank == 0:
            self.run_dir.event(self.precision_text)
        say(f"mixture {data.plan.describe()} over {tokens} tokens in {config.train.steps} steps")
        slow = native.missing()
        if slow is not None:
            say(f"warning: {slow}")


def _fetched(bucket: Bucket, run_path: Path) -> None:
    """Have the newest checkpoint in the run directory."""
    bucket.fetch_newest(run_path, lambda text: say(f"warning: {text}"))


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
