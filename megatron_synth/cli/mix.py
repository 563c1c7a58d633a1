"""`megatron-synth mix`: what a mixture gives, what one sample holds, and whether a run got what was planned."""

from __future__ import annotations

import argparse
import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt

from megatron_synth.cli.audit_learned import Difference, audit_learned, recorded_in
from megatron_synth.cli.options.types import on_disk, parse_verb
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import NOT_BEGUN, Config, Progress
from megatron_synth.core.log import show, table
from megatron_synth.data.loading import shared_content
from megatron_synth.data.loading.run_data import RunData, open_data, plan_of
from megatron_synth.data.mixing.ledger import Ledger
from megatron_synth.data.mixing.mixture import MixturePlan
from megatron_synth.data.mixing.tables import phase_tables, source_table
from megatron_synth.data.shards import places
from megatron_synth.data.shards.selection import SelectedSource
from megatron_synth.train.checkpoint import branch, fetched, files
from megatron_synth.train.checkpoint.branch import Trunk
from megatron_synth.train.dryrun import prepared_sources
from megatron_synth.train.record import metrics
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.record.shapes import LedgerInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXIT_DIFFERENT = 1
_SHOWN = 40
"""Differences that `audit` prints one by one."""


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth mix", description="Look into the mixture of a run. Nothing is trained."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    plan = verbs.add_parser("plan", help="shares, tokens and epochs by phase and source, and when each source runs out")
    show = verbs.add_parser("show", help="what one sample holds: source, epoch, window, shard, documents, text")
    for one in (plan, show):
        one.add_argument("config", type=on_disk, help="a training configuration, or a run directory")
    show.add_argument("sample", type=_samples, help="number of the sample, from 0, or FIRST-LAST")
    show.add_argument("--text", action="store_true", help="decode its tokens")
    for one in (plan, show):
        one.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings to change: train.steps=10")
    audit = verbs.add_parser(
        "audit", help="recompute what a run should have consumed and learned, and compare it with its records"
    )
    audit.add_argument("run", help="run directory, or URL of a run in a bucket")
    return parser


def main(argv: list[str]) -> int:
    """Run `mix plan`, `mix show` or `mix audit` and return the exit code; 1: the audit found differences."""
    arguments = parse_verb(parser(), argv)
    verb = argv[0]
    if verb == "audit":
        return _audit(fetched.local_records(arguments.run))
    file = arguments.config / "config.yaml" if arguments.config.is_dir() else arguments.config
    config = load_file(Config, file, arguments.overrides)
    run = arguments.config if arguments.config.is_dir() else None
    config = branch.resolved(config, run)
    progress = branch.progress_of(config, run)
    if verb == "plan":
        _plan(config, progress)
    else:
        data = open_data(config, check_length=False)
        data.check_length(config, progress)
        trunk = branch.trunk_of(config, run)
        records = [] if run is None else metrics.read_steps(run / "metrics.jsonl")
        steps = Steps(config, progress, records, NOT_BEGUN if trunk is None else trunk.progress)
        show("\n\n".join(show_sample(config, data, sample, steps, text=arguments.text) for sample in arguments.sample))
    return EXIT_OK


class Steps:
    """Which step of a run a sample is in: by the records of steps done, of whatever size, then by the configuration."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        records: Sequence[metrics.Record] = (),
        trunk: Progress = NOT_BEGUN,
    ):
        """records: of the run's own steps, after those of its trunk."""
        self._config, self._progress, self._trunk = config, progress, trunk
        # records of versions that did not count tokens tell nothing
        counted = [record.get(metrics.TOKENS) for record in records[: progress.step - trunk.step]]
        self._ends = [] if None in counted else [tokens // config.window_length for tokens in counted if tokens is not None]
        self.samples = config.samples_at_end(progress)
        """Of the whole run."""

    def of(self, sample: int) -> int:
        """The step, counted from 1; 0 for a sample that the trunk of a branch consumed."""
        if sample < self._trunk.samples:
            return 0
        if self._ends and sample < self._ends[-1]:
            return self._trunk.step + bisect.bisect_right(self._ends, sample) + 1
        return self._config.step_after(sample, self._progress) + 1

    def sequences(self, sample: int) -> int:
        """Of the step of a sample, by the configuration."""
        return self._config.train.batch_size_of(max(self.of(sample) - 1, 0))

    def text(self, sample: int) -> str:
        """The same in words."""
        step = self.of(sample)
        return (
            f"step {step} of {self._config.train.steps}"
            if step
            else f"of the trunk's part, which ends with step {self._trunk.step}"
        )


def _samples(text: str) -> range:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
        raise argparse.ArgumentTypeError(f"expected the number of a sample such as 7, or a range such as 8-15, found '{text}'")
    return range(int(first), int(last or first) + 1)


# ---- plan


def _plan(config: Config, progress: Progress) -> None:
    """Print the tables, then refuse what a training run would refuse."""
    length, total = config.window_length, config.samples_at_end(progress)
    sources, domains = prepared_sources(config)
    prepared = [name for name, source in sources.items() if source is not None]
    order = plan_of(config, {name: source.num_tokens if source else None for name, source in sources.items()})
    number = config.data.windows_per_sequence
    sequences = "" if number == 1 else f" in sequences of {number}"
    behind = f", {progress.samples:,} samples in {progress.step:,} steps of them consumed" if progress.step else ""
    show(f"{total:,} samples of {length} tokens{sequences} = {total * length:,} tokens{behind}, data seed {config.data_seed}\n")
    show(phase_tables(config, order, prepared, progress))
    show(f"\nin all\n{source_table(config, order, prepared, progress)}")
    opened = [source for source in sources.values() if source is not None]
    for source in opened:
        if isinstance(source, SelectedSource):
            chosen, all_ = source.num_documents, source.base.num_documents
            show(f"{source.name}: {chosen:,} of {all_:,} documents of {source.path}, where {source.where}")
        if source.manifest is not None and source.masked:
            show(f"{source.path}: {source.manifest.learned_tokens:,} of {source.manifest.counts.tokens:,} tokens are learned")
    validation = {name: domain for name, domain in domains.items() if domain is not None}
    for text in shared_content.notes(opened, validation, config.data.exclude_parents_of is not None):
        show(f"note: {text}")
    order.check(total, length, progress.samples)
    if len(opened) == len(sources):
        shared_content.check_epochs(order, opened, total)


# ---- show


def show_sample(config: Config, data: RunData, sample: int, steps: Steps, *, text: bool) -> str:
    """Where a sample comes from, and what is in it. steps: of the run.

    Raises:
        UserError: there is no such sample, or no tokenizer to decode it with.
    """
    plan, length = data.plan, config.window_length
    last = plan.skips.end(steps.samples) - 1
    if not 0 <= sample <= last:
        raise UserError(f"sample {sample}: the run has samples 0 to {last}; a longer one needs more train.steps")
    tokenizer = _tokenizer(data) if text else None
    [[source_id], [occurrence]] = (part.tolist() for part in plan.occurrences([sample]))
    window, offset = (int(part[0]) for part in plan.places([sample])[1:])
    spec, source = plan.sources[source_id], data.sources[source_id]
    epoch, place = divmod(occurrence, spec.epoch_windows)
    start = window * length + offset
    cut = "" if spec.epoch_windows == spec.num_windows else f", {spec.epoch_windows} of them in use"
    if spec.shift:
        cut = f", which begin at token {offset} in this epoch"
    where = "left out by data.skip" if plan.skips.holds(sample) else steps.text(plan.skips.position(sample))
    number = config.data.windows_per_sequence
    before = sample // number * number
    beside = "" if number == 1 else f", beside samples {before} to {before + number - 1} in its sequence"
    lines = [
        f"sample   {sample}: {where}, now {steps.sequences(sample)} sequences a step{beside}",
        f"phase    {plan.schedule.phase_of(sample)} of {len(plan.schedule.phases)}, counted from 0",
        f"source   {spec.name}, its sample {occurrence}: epoch {epoch}, place {place} of {spec.epoch_windows}",
        f"window   {window} of {spec.num_windows}{cut}: tokens {start} to {start + length} of the source",
    ]
    rows: list[tuple[str, ...]] = [("document", "of its shard", "tokens", "from", "to", "begins", "ends")]
    numbers, parts = [], []
    for span in places.spans(source, start, start + length + 1):
        lies = f"tokens {span.begin} to {span.end - 1} of {span.shard.num_tokens}"
        lines.append(f"file     {span.shard.bin_path}: {lies}")
        for number, first, after in places.documents(span):
            begin, end = max(span.begin, first), min(span.end, after)
            begins = "here" if first >= span.begin else f"{span.begin - first} tokens before"
            ends = "here" if after <= span.end else f"{after - span.end} tokens later"
            name = str(span.documents_before + number)
            rows.append(
                (name, f"{number} of {span.shard.prefix.name}", str(end - begin), str(begin), str(end - 1), begins, ends)
            )
            numbers.append(name)
            parts.append((span.at + begin - span.begin, span.at + end - span.begin))
    lines += ["", table(rows)]
    if tokenizer is not None:
        tokens = np.empty(length + 1, dtype=np.int64)
        source.read(start, tokens)
        learned = np.ones(length + 1, dtype=np.bool_)
        if source.masked:
            source.read_learned(start, learned)
            lines += [
                "",
                f"{int(learned[1:].sum())} of the {length} labels are learned; {NOT_LEARNED[0]}text{NOT_LEARNED[1]} is not",
            ]
        for name, (first, last) in zip(numbers, parts, strict=True):
            lines += ["", f"--- document {name}", _marked(tokenizer, tokens[first:last], learned[first:last])]
    return "\n".join(lines)


NOT_LEARNED = "⟦", "⟧"
"""Around what is read and not learned."""


def _marked(tokenizer: Tokenizer, tokens: npt.NDArray[np.int64], learned: npt.NDArray[np.bool_]) -> str:
    """The text of tokens [T], with marks around those that are not learned."""
    text = []
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    for first, last in pairwise(edges):
        decoded = tokenizer.decode(tokens[first:last].tolist(), skip_special_tokens=False)
        text.append(decoded if learned[first] else f"{NOT_LEARNED[0]}{decoded}{NOT_LEARNED[1]}")
    return "".join(text)


def _tokenizer(data: RunData) -> Tokenizer:
    from tokenizers import Tokenizer

    if data.tokenizer is None:
        raise UserError("data.tokenizer: not set, and no source has a manifest that names its tokenizer: leave out --text")
    if not data.tokenizer.is_file():
        raise UserError(f"{data.tokenizer}: no such tokenizer.json; set data.tokenizer, or leave out --text")
    try:
        return Tokenizer.from_file(str(data.tokenizer))
    except Exception as error:  # the library raises it bare
        raise UserError(f"{data.tokenizer}: not a tokenizer.json, {error}") from None


# ---- audit


def _audit(path: Path) -> int:
    """Print what was read and found."""
    run = RunDir.open(path)
    config = load_file(Config, run.path / "config.yaml")
    recorded = run.read_ledger()
    if recorded is None:
        raise UserError(f"{run.ledger}: missing: the run has not saved yet, there is nothing to audit")
    data, trunk = open_data(config, check_length=False), branch.trunk_of(config, run.path)
    plan, length = data.plan, config.window_length
    show(f"read {run.path / 'config.yaml'}: the plan, {plan.describe()}, data seed {config.data_seed}")
    for spec, source in zip(plan.sources, data.sources, strict=True):
        file = f"{source.path}.idx" if source.manifest is None else source.path / "manifest.json"
        show(f"read {file}: {spec.name}, {spec.num_windows:,} windows of {length} tokens")
    found = audit_trunk(data, trunk) if trunk is not None else []
    if trunk is not None:
        show(
            f"read {run.path / branch.FILE}: {trunk.samples:,} samples up to step {trunk.step} of the trunk, run {trunk.run_id}"
        )
    records = metrics.read_steps(run.metrics)
    unlearned = unlearned_by(plan, length, records, recorded["samples"], trunk)
    found += audit_ledger(plan, length, recorded, run.ledger, trunk, unlearned)
    show(f"read {run.ledger}: {recorded['samples']} samples, {recorded['tokens']} tokens")
    found += audit_metrics(
        plan, length, records, recorded["tokens"], run.metrics, NOT_BEGUN if trunk is None else trunk.progress
    )
    show(f"read {run.metrics}: {len(records):,} steps")
    checkpoints = [(file, files.STATE.read(file)) for file in sorted(run.checkpoints.glob("step_*/trainer.json"))]
    for file, state in checkpoints:
        found += audit_checkpoint(data, state, file)
        show(f"read {file}: {state['samples']:,} samples")
    learned = audit_learned(config, data, recorded_in(config, recorded, run.ledger, checkpoints), records, trunk)
    told = {difference[:3] for difference in learned}  # a figure beyond its bound is told once, by what is right
    found = [difference for difference in found if difference[:3] not in told] + learned
    if not found:
        show(f"equal: the run consumed what was planned, to the token, in {recorded['tokens']:,} tokens")
        return EXIT_OK
    show(f"{len(found)} difference{'s' if len(found) > 1 else ''}" + (f", the first {_SHOWN}" if len(found) > _SHOWN else ""))
    show(table([("file", "at", "what", "planned", "recorded"), *found[:_SHOWN]]))
    return EXIT_DIFFERENT


def audit_trunk(data: RunData, trunk: Trunk) -> list[Difference]:
    """What in a branch.json is not as planned for the samples of the trunk."""
    if not _is_count(trunk.samples, data.plan):
        return [(branch.FILE, "trunk", "samples", "samples of the plan", str(trunk.samples))]
    planned = dict(zip(data.plan.names, data.plan.counts(trunk.samples).tolist(), strict=True))
    found = _leaves(
        planned, dict.fromkeys(planned, 0) | {name: count for name, count in trunk.ledger.items() if count}, "trunk"
    )
    if not data.begins_as(trunk.prefix_digest, trunk.samples):
        found.append(("trunk", "prefix_digest", data.prefix_digest(trunk.samples), trunk.prefix_digest))
    return [(branch.FILE, *difference) for difference in found]


def unlearned_by(
    plan: MixturePlan, window_length: int, records: list[metrics.Record], samples: int, trunk: Trunk | None
) -> dict[str, int]:
    """Samples by source of the steps that the records call skipped, among the first `samples`, and of a trunk's."""
    found = Counter({} if trunk is None else trunk.unlearned)
    before = 0 if trunk is None else trunk.samples
    skipped = 0 if trunk is None else trunk.skipped
    for record in records:
        tokens, now = record.get(metrics.TOKENS), record.get(metrics.SKIPPED)
        if not isinstance(tokens, int) or not isinstance(now, int):
            continue  # of a version that did not count them
        end = tokens // window_length
        grew = now > skipped
        if grew and _is_count(end, plan) and before < end <= samples:
            counts = plan.counts(end) - plan.counts(before)
            found.update({name: count for name, count in zip(plan.names, counts.tolist(), strict=True) if count})
        before, skipped = end, now
    return dict(found)


def audit_ledger(
    plan: MixturePlan,
    window_length: int,
    recorded: LedgerInfo,
    file: Path,
    trunk: Trunk | None = None,
    unlearned: Mapping[str, int] | None = None,
) -> list[Difference]:
    """What in a ledger.json is not as planned for its number of samples.

    trunk: of a branch, which is counted apart. unlearned: samples of skipped steps by source.
    """
    samples = recorded["samples"]
    if not _is_count(samples, plan):
        return [(file.name, "run", "samples", "samples of the plan", str(samples))]
    ledger = Ledger.planned(plan, window_length, samples)
    if trunk is not None:
        before = dict(zip(plan.names, plan.counts(min(trunk.samples, samples)).tolist(), strict=True))
        ledger.begin_branch(trunk.run_id, trunk.step, before)
    if unlearned and "unlearned" in recorded:  # older versions did not count them
        ledger.load_state_dict(ledger.state_dict(), unlearned)
    planned = ledger.to_json()
    delivered = {key: value for key, value in recorded.items() if key != "learned"}
    found = [(file.name, *difference) for difference in _leaves(planned, delivered)]
    for name, labels in recorded["learned"]["sources"].items() if "learned" in recorded else ():
        most = (ledger.state_dict().get(name, 0) - (unlearned or {}).get(name, 0)) * window_length
        if labels > most:
            found.append((file.name, name, "learned", f"at most {most}", str(labels)))
    for spec, count in zip(plan.sources, plan.counts(samples).tolist(), strict=True):
        if spec.allowed_samples is not None and count > spec.allowed_samples:
            limit = f"at most {spec.allowed_samples}, max_epochs {spec.max_epochs:g}"
            found.append((file.name, spec.name, "samples", limit, str(count)))
    return found


def audit_metrics(
    plan: MixturePlan,
    window_length: int,
    records: list[metrics.Record],
    saved_tokens: int | None,
    file: Path,
    trunk: Progress = NOT_BEGUN,
) -> list[Difference]:
    """What in the records of the steps is not as planned.

    saved_tokens: those of ledger.json, written after some step. trunk: where a branch began.
    """
    found: list[Difference] = []
    step, before = trunk
    saved = not saved_tokens
    for record in records:
        step, expected = record[metrics.STEP], step + 1
        at = f"step {step}"
        if step != expected:
            found.append((file.name, at, metrics.STEP, str(expected), str(step)))
        tokens = record.get(metrics.TOKENS)
        saved = saved or tokens == saved_tokens
        samples, part = divmod(tokens, window_length) if isinstance(tokens, int) else (None, 0)
        if part or not _is_count(samples, plan) or samples <= before:
            what = f"more than {before * window_length}, in samples of {window_length}"
            found.append((file.name, at, metrics.TOKENS, what, str(tokens)))
            continue
        before = samples
        for name, source in Ledger.planned(plan, window_length, samples).to_json()["sources"].items():
            for key, planned in ((metrics.SHARE + name, source["share"]), (metrics.EPOCH + name, source["epochs"])):
                # a source that joined the run later is not in the records before
                value = record.get(key, None if source["samples"] else planned)
                if value != planned:
                    found.append((file.name, at, key, repr(planned), repr(value)))
        names = set(metrics.parts(record, metrics.SHARE)) - set(plan.names)
        found += [(file.name, at, metrics.SHARE + name, "no such source", str(record[metrics.SHARE + name])) for name in names]
    if not saved:
        found.append((file.name, "run", metrics.TOKENS, f"a step at {saved_tokens}, as in ledger.json", "none"))
    return found


def audit_checkpoint(data: RunData, state: files.SavedState, file: Path) -> list[Difference]:
    """What in a checkpoint's trainer.json is not as planned for its number of samples."""
    place = f"{file.parent.name}/{file.name}"
    samples = state["samples"]
    if not _is_count(samples, data.plan):
        return [(place, "run", "samples", "samples of the plan", str(samples))]
    planned = dict(zip(data.plan.names, data.plan.counts(samples).tolist(), strict=True))
    recorded = dict.fromkeys(planned, 0) | state["ledger"]
    found = [(place, *difference) for difference in _leaves(planned, recorded, "ledger")]
    # a mixture that changed after the checkpoint leaves the digest of what came before as it is
    prefix = state.get("prefix_digest")
    if prefix and not data.begins_as(prefix, samples):
        found.append((place, "run", "prefix_digest", data.prefix_digest(samples), prefix))
    elif not prefix and not data.is_of(state["plan_digest"]):
        found.append((place, "run", "plan_digest", data.digest, state["plan_digest"]))
    return found


def _is_count(samples: object, plan: MixturePlan) -> TypeGuard[int]:
    end = plan.samples
    return isinstance(samples, int) and samples >= 0 and (end is None or samples <= end)


def _leaves(planned: Any, recorded: Any, place: str = "") -> list[tuple[str, str, str, str]]:
    """(place, key, planned, recorded) of every leaf in which two nested dicts differ, on either side."""
    found = []
    for key in [*planned, *(key for key in recorded if key not in planned)]:
        old, new = planned.get(key, "nothing"), recorded.get(key, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            found += _leaves(old, new, key)
        elif old != new:
            found.append((place or "run", key, str(old), str(new)))
    return found
