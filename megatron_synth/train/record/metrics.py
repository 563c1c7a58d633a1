"""The record of a step: its names, metrics.jsonl, and the console line.

One step is one dict with the key `step` and the names below; the same dict goes to metrics.jsonl (the truth), the
console and the tracker. Units: losses in nats per token (None for a mean over nothing: no label counted), `eval/bpb` in bits
per byte, `perf/mfu` a fraction of the dense BF16 peak (None where the peak is unknown), `perf/data_pct` in percent,
`mem/peak_gib` in GiB, `perf/step_s` in seconds, `data/tokens` trained tokens since step 0.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import duration, gib, human, scientific
from megatron_synth.core.records import Count, Number, Whole, first_fault, parse_json, read_bytes
from megatron_synth.estimate.hardware import show_mfu

STEP = "step"
LOSS = "train/loss"
Z_LOSS = "train/z_loss"  # what it adds to the loss; only where there is one
SOURCE_LOSS = "train/loss/"  # + source
LOSS_BY = "train/loss_by/"  # + column/value of the documents (log.loss_by)
GRAD_NORM = "optim/grad_norm"  # before clipping
LR = "optim/lr"
SKIPPED = "optim/skipped"  # steps skipped since step 0, for a loss or gradient that was not finite
CLIPPED = "optim/clipped_heads"  # heads that QK-clip has scaled since the start, each step's counted; at log steps
TOKENS_PER_SEC = "perf/tokens_per_sec_per_gpu"
TFLOPS = "perf/tflops_per_gpu"
MFU = "perf/mfu"
STEP_S = "perf/step_s"
DATA_PCT = "perf/data_pct"
PEAK_GIB = "mem/peak_gib"
TOKENS = "data/tokens"
SHARE = "data/share/"  # + source: fraction of the trained tokens so far
EPOCH = "data/epoch/"  # + source: passes over the source so far
PRECISION = "fp8/layers"  # text, at the first step of every start: which layers run in which format
GRAD_NORMS = "health/grad_norm/"  # + layer number, embedding, final_norm or head; before clipping
WEIGHT_NORMS = "health/weight_norm/"  # + likewise; before the update
UPDATE_NORMS = "health/update_norm/"  # + likewise; weights after the update less those before it
ACTIVATIONS = "health/activation_rms/"  # + layer number: root mean square of what the layer hands on
MAX_LOGITS = "health/max_logit/"  # + layer number: largest attention logit of the sampled row
ENTROPY = "health/entropy"  # of the output's distribution, in nats; mean over places of the sampled row
PADDING_PROBABILITY = "health/padding_probability"  # what the vocabulary's padding would have if it were not masked
PADDING_NORMS = "health/padding_norm/"  # + embedding or head: norm of the rows that pad the vocabulary
SATURATED = "health/fp8_saturated/"  # + FP8 layer: share of its numbers cut to the format's largest
EVAL = "eval/"
EMA = "ema/"  # the same of the average of the weights (optim.ema_decay)
EVAL_LOSS = "eval/loss"  # mean over domains, weighted by tokens
EVAL_DOMAIN_LOSS = "eval/loss/"  # + domain
EVAL_LOSS_BY = "eval/loss_by/"  # + column/value: over the documents of all domains
EVAL_BPB = "eval/bpb"  # over all domains' bytes
EVAL_DOMAIN_BPB = "eval/bpb/"  # + domain
EVAL_DOMAIN_TOKENS = "eval/tokens/"  # + domain: tokens evaluated
EVAL_ANSWERS_BPB = "eval/answers_bpb/"  # + domain of data.answers: bits per byte of the right answers alone
EVAL_ACCURACY = "eval/accuracy/"  # + likewise: share of questions whose right answer is the likeliest
EVAL_ACCURACY_PER_BYTE = "eval/accuracy_per_byte/"  # + likewise: by log-likelihood over bytes
EVAL_RANK = "eval/rank/"  # + likewise: mean place of the right answer by log-likelihood, 1 is the likeliest
TASKS = "tasks/"  # + task/metric, by lm-evaluation-harness, in the units of the task

GIB = 2**30
MAX_BYTES = 2**32
"""Of a metrics.jsonl."""

NON_FINITE = "non_finite"
"""Key, on disk only, of `{name: "nan" | "inf" | "-inf"}`: JSON has no such numbers, so their places hold null."""

Record = dict[str, Any]


def parts(record: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What follows `prefix` in the names of `record`, in their order: `parts(r, "train/loss/")` is loss by source."""
    return {name[len(prefix) :]: value for name, value in record.items() if name.startswith(prefix)}


def losses_by(prefix: str, names: Sequence[str], losses: Sequence[float], labels: Sequence[float]) -> Record:
    """Mean losses by name, of those that have labels."""
    return {prefix + name: loss / count for name, loss, count in zip(names, losses, labels, strict=True) if count}


# ---- metrics.jsonl


def encode(record: Mapping[str, Any]) -> str:
    """One line of strict JSON, floats in the shortest form that reads back to the same bits."""
    odd = {name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    if odd:
        record = {name: None if name in odd else value for name, value in record.items()} | {NON_FINITE: odd}
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


class _Line(BaseModel):
    """A line of metrics.jsonl: numbers by name, null where one is unknown; text only under names that are no measurement."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, Whole | Number | str | None]

    step: Count
    tokens: Count | None = Field(None, alias=TOKENS)
    non_finite: dict[str, Literal["nan", "inf", "-inf"]] = {}

    @model_validator(mode="after")
    def _measurements_are_numbers(self) -> _Line:
        assert self.model_extra is not None
        for name, value in self.model_extra.items():
            if isinstance(value, str) and name.startswith(_MEASURED):
                raise ValueError(f"{name} holds text, expected a number")
        for name in self.non_finite:
            if self.model_extra.get(name, 0) is not None:
                raise ValueError(f"{NON_FINITE} names {name}, which is not null")
        return self


_MEASURED = ("train/", "optim/", "perf/", "mem/", "data/", "eval/", "health/", TASKS)


def decode(line: str | bytes) -> Record:
    """The record that `encode` wrote, bit for bit; ValueError if the line is not one."""
    return _checked(parse_json(line))


def _checked(record: Any) -> Record:
    try:
        _Line.model_validate(record)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
    checked: Record = record
    for name, value in checked.pop(NON_FINITE, {}).items():
        checked[name] = float(value)
    return checked


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics.jsonl; empty if there is no file.

    A last line that a crash cut short is left out. Damage anywhere else is a UserError, since it is no crash of ours.
    """
    return decode_lines(path, read_bytes(path, MAX_BYTES)) if path.exists() else []


def read_steps(path: Path) -> list[Record]:
    """As `read_metrics`, without the evaluation before the first step (`eval.at_start`)."""
    return [record for record in read_metrics(path) if record[STEP]]


def decode_lines(path: Path, content: bytes, skipped: int = 0) -> list[Record]:
    """The records in the lines of a metrics.jsonl, of which `skipped` stand before; otherwise as `read_metrics`."""
    lines = content.split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break  # cut short
            raise _not_a_record(path, skipped, number, len(lines), error) from error
        try:
            records.append(_checked(value))
        except ValueError as error:
            raise _not_a_record(path, skipped, number, len(lines), error) from error
    return records


def _not_a_record(path: Path, skipped: int, number: int, lines: int, error: ValueError) -> UserError:
    where = f"line {skipped + number} of {skipped + lines}"
    return UserError(f"{path}: {where} is not a step record ({error}); restore the file or delete the line")


class MetricsFile:
    """metrics.jsonl of a run, opened for writing; one process may write it."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, records: Iterable[Record]) -> None:
        """Add one line per record, all of them or none; each must hold plain Python values and the key `step`.

        Raises:
            OSError: none was added, because the disk is full, say.
        """
        lines = []
        for record in records:
            assert STEP in record, f"a record without {STEP!r}: {sorted(record)}"
            lines.append(encode(record) + "\n")
        if not lines:
            return
        with open(self.path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    size = self._whole_lines()
                    file.truncate(size)  # a crash left a torn line
            content = memoryview("".join(lines).encode())
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(size)
                raise

    def _whole_lines(self) -> int:
        """Bytes up to the end of the last line that is whole."""
        return self.path.read_bytes().rfind(b"\n") + 1

    def replace_last(self, record: Record) -> None:
        """Write `record`, which has grown, in the place of the last line, which is of the same step.

        Raises:
            OSError: the line stayed as it was.
        """
        with open(self.path, "r+b", buffering=0) as file:
            size, step = file.seek(0, os.SEEK_END), 4096
            while True:
                file.seek(max(0, size - step))
                tail = file.read(size)
                if tail.count(b"\n") > 1 or step >= size:
                    break
                step *= 2
            old = tail.splitlines(keepends=True)[-1]
            assert decode(old)[STEP] == record[STEP], f"{self.path}: the last line is not of step {record[STEP]}"
            begin = size - len(old)
            try:
                self._overwrite(file, begin, (encode(record) + "\n").encode())
            except OSError:
                self._overwrite(file, begin, old)
                raise

    @staticmethod
    def _overwrite(file: FileIO, begin: int, content: bytes) -> None:
        file.seek(begin)
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        file.truncate(begin + len(content))

    def truncate_after(self, step: int) -> list[Record]:
        """Drop the records of steps beyond `step`, and a torn last line; returns those that stay.

        Call it before the first append of a resumed run: the steps after the checkpoint will be run again.
        """
        if not self.path.exists():
            return []
        kept = [record for record in read_metrics(self.path) if record[STEP] <= step]
        write_atomic(self.path, "".join(encode(record) + "\n" for record in kept))
        return kept


# ---- mean step time and time left


class RunningWindow:
    """Mean of the last `size` values, the first `skip` of a run left out: they hold compilation and warm caches."""

    def __init__(self, skip: int = 3, size: int = 100):
        assert skip >= 0 and size >= 1
        self._to_skip = skip
        self._values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        """Count one value."""
        if self._to_skip:
            self._to_skip -= 1
        else:
            self._values.append(value)

    @property
    def mean(self) -> float | None:
        """Mean of the window; None until a value counts."""
        return math.fsum(self._values) / len(self._values) if self._values else None

    def eta_s(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` steps will take, the values being seconds per step; None until one counts."""
        mean = self.mean
        return None if mean is None else mean * steps_left


# ---- the console


def _tflops(value: float) -> str:
    """Three significant digits: `512`, `0.00412` on a CPU, and `1240` without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_step(
    record: Mapping[str, Any],
    total_steps: int,
    *,
    eta_s: float | None = None,
    memory_total_gib: float | None = None,
) -> str:
    """The log line of one step.

    record: as in metrics.jsonl; a part that it lacks is left out, one whose value is None reads `n/a`.
    eta_s: seconds left, None while unknown. memory_total_gib: of the device; None on CPU, where only the peak shows.
    """

    def part(name: str, text: str, form: Any) -> None:
        if name in record:
            value = record[name]
            shown.append(text.format("n/a" if value is None else form(value)))

    shown = [f"step {record[STEP]}/{total_steps}"]
    part(LOSS, "loss {}", "{:.4f}".format)
    part(GRAD_NORM, "gnorm {}", "{:.2f}".format)
    part(LR, "lr {}", scientific)
    unit = "rank" if memory_total_gib is None else "gpu"
    part(TOKENS_PER_SEC, f"{{}} tok/s/{unit}", human)
    part(TFLOPS, f"{{}} TFLOP/s/{unit}", _tflops)
    part(MFU, "mfu {}", show_mfu)
    total = "" if memory_total_gib is None else f"/{gib(memory_total_gib * GIB)}"
    part(PEAK_GIB, "mem {} GiB", lambda peak: gib(peak * GIB) + total)
    part(DATA_PCT, "data {}", "{:.1f}%".format)
    part(STEP_S, "step {}", "{:.2f}s".format)
    part(TOKENS, "tokens {}", scientific)
    shown.append(f"eta {'n/a' if eta_s is None else duration(eta_s)}")
    part(SKIPPED, "skipped {}", str)
    return " | ".join(shown)


def format_eval(record: Mapping[str, Any]) -> str:
    """The log line of an evaluation: loss by domain, their mean by tokens, and bits per byte where they are known."""
    domains = parts(record, EVAL_DOMAIN_LOSS)
    shown = [f"eval step {record[STEP]}", *(f"{domain} {_loss(loss)}" for domain, loss in domains.items())]
    if EVAL_LOSS in record:
        shown.append(f"mean {_loss(record[EVAL_LOSS])}")
    if record.get(EVAL_BPB) is not None:
        shown.append(f"bpb {record[EVAL_BPB]:.2f}")
    for domain, bits in parts(record, EVAL_ANSWERS_BPB).items():
        accuracy = record.get(EVAL_ACCURACY + domain)
        shown.append(f"{domain} answers bpb {_loss(bits)}" + ("" if accuracy is None else f" accuracy {accuracy:.3f}"))
    if EMA + "loss" in record:
        shown.append(f"average of the weights: mean {_loss(record[EMA + 'loss'])}")
    return " | ".join(shown)


def _loss(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def has_eval(record: Mapping[str, Any]) -> bool:
    """Whether the step of `record` ended with an evaluation."""
    return any(name.startswith((EVAL_DOMAIN_LOSS, EVAL_ANSWERS_BPB)) for name in record)
