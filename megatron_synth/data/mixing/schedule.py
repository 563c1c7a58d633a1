"""A mixture that changes: phases one after the other, each with fixed ratios or with a straight line between two mixtures.

Which source sample n comes from, and how many samples that source gave before it since the run began, is a function of
n and of the phases that began before sample n; what follows them, and where the phase of n ends, changes nothing. A
source that a later phase uses again goes on where it stopped.

**Fixed ratios.** The order is that of `apportion`, begun afresh: counted from the start of the phase, every count is
within 1 - 1/(2K - 2) of a sample of its share after every prefix, for the K sources that the phase uses.

**A ramp** from ratios a to ratios b over L samples has N blocks that end at the whole samples nearest to i L / N. Block
i = 0 .. N-1 has the fixed ratios a + (b - a) (2i + 1) / (2N): the line at the middle of the block, as exact fractions.
What each block would leave over is carried on instead of lost. With D_j(i) the exact share of source j in the blocks
before i, the counts x_j(i) there are D_j(i) rounded down or up, by the earliest deadline: the sources whose rounded-up
count is due first, at the first block before which D_j reaches it, are rounded up first. That always succeeds, for the
reason that `apportion` gives, with whole blocks in place of steps and e -> 0: between the ends of blocks s and t the
samples that must fall inside are at most floor(D_j(t)) - ceil(D_j(s)) of each source or none, together at most what
the blocks hold. (For the part of a block that is not whole periods of its ratios, to be exact; the whole periods give
whole numbers.) In a block whole periods come first, ordered by `apportion` for the block's ratios; the T samples left
over hold whole numbers d_j of each source and are ordered by `apportion` for d_j / T. Before the first of them
|x - D| < 1 at the start of the block and at most 1 - 1/(2K - 2) more within it; among them, at most 1 - 1/(2K - 2) from
a straight line whose ends are less than 1 from D. So, counted from the start of the ramp, every count is less than 2
samples from its share after every prefix, however many blocks there are.

**In all** the deviations of phases add up, as no phase may depend on the next: after sample n in phase p (from 0), each
count is less than p + 2 samples from its exact share since the run began, and exact at the start of each phase when all
before it were whole periods of their ratios.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import DataConfig
from megatron_synth.data.mixing.apportionment import MAX_DENOMINATOR, Apportionment, apportionment, check_ratios

Int64 = npt.NDArray[np.int64]
Ratios = tuple[Fraction, ...]


@dataclass(frozen=True)
class Phase:
    """A part of a run."""

    samples: int | None
    """Length. None: without end, for the last phase only."""
    ratios: Ratios
    """[K] share of each source; at the start of the phase, for a ramp."""
    ramp_to: Ratios | None = None
    """[K] shares at the end of a ramp."""
    blocks: int = 1
    """Steps of a ramp."""
    line: int | None = None
    """Samples of the whole line of a ramp, where the phase ends before it does."""


class _Fixed:
    """Fixed ratios without end."""

    def __init__(self, ratios: Ratios):
        check_ratios(ratios)
        self._ratios = ratios

    @functools.cached_property
    def _order(self) -> Apportionment:
        return apportionment(self._ratios)

    def locate(self, positions: Int64) -> tuple[Int64, Int64]:
        return self._order.locate(positions)

    def counts(self, samples: int) -> Int64:
        return self._order.counts(samples)

    def due(self, samples: int) -> Ratios:
        return tuple(samples * ratio for ratio in self._ratios)


@dataclass(frozen=True)
class _Block:
    """One block of a ramp: whole periods of its ratios, then a rest of given whole numbers."""

    start: int
    """Sample of the ramp that it begins with."""
    whole: int
    """Samples in whole periods."""
    ratios: Ratios
    rest: Ratios
    """[K] shares among the rest; empty when nothing is left over."""
    counts_before: Int64
    """[K] samples of each source in the ramp before this block."""
    counts_whole: Int64
    """[K] ... before the rest."""

    def locate(self, positions: Int64) -> tuple[Int64, Int64]:
        sources, occurrences = np.empty_like(positions), np.empty_like(positions)
        inside = positions - self.start
        head = inside < self.whole
        for chosen, shift, ratios, before in (
            (head, 0, self.ratios, self.counts_before),
            (~head, self.whole, self.rest, self.counts_whole),
        ):
            if chosen.any():
                source, occurrence = apportionment(ratios).locate(inside[chosen] - shift)
                sources[chosen], occurrences[chosen] = source, occurrence + before[source]
        return sources, occurrences

    def counts(self, samples: int) -> Int64:
        inside = samples - self.start
        if inside <= self.whole:
            return self.counts_before + (apportionment(self.ratios).counts(inside) if inside else 0)
        return self.counts_whole + apportionment(self.rest).counts(inside - self.whole)


class _Ramp:
    """A line from one mixture to another, in blocks."""

    def __init__(self, phase: Phase):
        assert phase.samples is not None and phase.ramp_to is not None
        check_ratios(phase.ratios)
        check_ratios(phase.ramp_to)
        self._length, self._number = phase.line or phase.samples, phase.blocks
        assert self._length >= phase.samples
        if self._length < phase.blocks:
            raise UserError(f"{phase.blocks} blocks, but only {self._length} samples: at most one block per sample")
        self._from, self._to = phase.ratios, phase.ramp_to
        common = math.lcm(*(ratio.denominator for ratio in (*phase.ratios, *phase.ramp_to)))
        self._unit = 2 * phase.blocks * common
        """Shares are whole numbers of 1 / unit."""
        if self._unit > MAX_DENOMINATOR:
            raise UserError(
                f"2 x {phase.blocks} blocks x {common}, the common denominator of the ratios, is {self._unit}, above "
                f"{MAX_DENOMINATOR}: use fewer blocks or ratios with fewer digits"
            )
        self._ends = [self._end(block) for block in range(phase.blocks + 1)]

    def _end(self, block: int) -> int:
        """Samples before block `block`: block x L / N, to the nearest, halves up."""
        return (2 * block * self._length + self._number) // (2 * self._number)

    def _share(self, block: int) -> list[int]:
        """[K] ratios of a block, in units."""
        twice = 2 * self._number
        pairs = zip(self._from, self._to, strict=True)
        return [int((a * (twice - 2 * block - 1) + b * (2 * block + 1)) * (self._unit // twice)) for a, b in pairs]

    @functools.cached_property
    def _due(self) -> list[list[int]]:
        """[N + 1][K] exact shares before each block, in units."""
        due = [[0] * len(self._from)]
        for block in range(self._number):
            length = self._ends[block + 1] - self._ends[block]
            due.append([before + length * share for before, share in zip(due[-1], self._share(block), strict=True)])
        return due

    @functools.cached_property
    def _blocks(self) -> list[_Block]:
        ratios = [tuple(Fraction(share, self._unit) for share in self._share(block)) for block in range(self._number)]
        lengths = [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]
        periods = [math.lcm(*(ratio.denominator for ratio in mixture)) for mixture in ratios]
        rests = [length % period for length, period in zip(lengths, periods, strict=True)]
        if max(rests) > MAX_DENOMINATOR:
            raise UserError(
                f"a block of {max(lengths)} samples whose ratios have no common denominator below {MAX_DENOMINATOR}: use more "
                "blocks or ratios with fewer digits"
            )
        residual = [[0] * len(self._from)]
        for block, rest in enumerate(rests):
            residual.append([due + rest * share for due, share in zip(residual[-1], self._share(block), strict=True)])
        rounded = _round_along(residual, self._unit)
        blocks, before = [], np.zeros(len(self._from), dtype=np.int64)
        for block, rest in enumerate(rests):
            whole = lengths[block] - rest
            counts_whole = before + np.array([int(whole * ratio) for ratio in ratios[block]], dtype=np.int64)
            numbers = [after - now for now, after in zip(rounded[block], rounded[block + 1], strict=True)]
            shares = tuple(Fraction(number, rest) for number in numbers) if rest else ()
            blocks.append(_Block(self._ends[block], whole, ratios[block], shares, before, counts_whole))
            before = counts_whole + np.array(numbers, dtype=np.int64)
        self._counts_after = before
        return blocks

    def locate(self, positions: Int64) -> tuple[Int64, Int64]:
        numbers = np.searchsorted(self._ends, positions, side="right") - 1
        if len(numbers) and numbers[0] == numbers[-1] and np.all(numbers == numbers[0]):
            return self._blocks[int(numbers[0])].locate(positions)
        sources, occurrences = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            sources[chosen], occurrences[chosen] = self._blocks[number].locate(positions[chosen])
        return sources, occurrences

    def counts(self, samples: int) -> Int64:
        blocks = self._blocks
        if samples == self._length:
            return self._counts_after.copy()
        return blocks[bisect.bisect_right(self._ends, samples) - 1].counts(samples)

    def due(self, samples: int) -> Ratios:
        block = min(bisect.bisect_right(self._ends, samples), self._number) - 1
        inside = samples - self._ends[block]
        shares = zip(self._due[block], self._share(block), strict=True)
        return tuple(Fraction(before + inside * share, self._unit) for before, share in shares)


def _round_along(due: list[list[int]], unit: int) -> list[list[int]]:
    """Whole numbers next to due / unit that never fall, each row with the sum of its due: earliest deadline first.

    due: [N + 1][K], rows that do not fall from one to the next and whose sums are multiples of `unit`.
    """
    columns = [list(column) for column in zip(*due, strict=True)]
    counts = [[0] * len(columns)]
    for row in range(1, len(due)):
        floors = [value // unit for value in due[row]]
        # rounded up before, and not yet due: stays up
        ahead = [before > floor for before, floor in zip(counts[-1], floors, strict=True)]
        free = sum(due[row]) // unit - sum(floors) - sum(ahead)
        candidates = [
            (bisect.bisect_left(column, (floor + 1) * unit), source)
            for source, (column, floor) in enumerate(zip(columns, floors, strict=True))
            if due[row][source] % unit and not ahead[source]
        ]
        assert 0 <= free <= len(candidates), (row, free, len(candidates))
        up = {source for _, source in sorted(candidates)[:free]}
        up |= {source for source, stays in enumerate(ahead) if stays}
        counts.append([floor + (source in up) for source, floor in enumerate(floors)])
    return counts


class Schedule:
    """The sources of all samples of a run, over its phases."""

    def __init__(self, phases: Sequence[Phase]):
        """At least one phase, of at least one sample each, over the same K sources; only the last may have no end."""
        assert phases and all(phase.samples is not None for phase in phases[:-1])
        assert len({len(phase.ratios) for phase in phases}) == 1
        self.phases = tuple(phases)
        self.starts: list[int] = [0]
        """First sample of each phase."""
        for phase in phases[:-1]:
            assert phase.samples is not None and phase.samples > 0
            self.starts.append(self.starts[-1] + phase.samples)
        last = phases[-1].samples
        self.samples = None if last is None else self.starts[-1] + last
        """Length; None: without end."""
        self._tracks = [_Fixed(phase.ratios) if phase.ramp_to is None else _Ramp(phase) for phase in phases]
        # written once per key, with a value that depends on the key alone: threads may share the object
        self._before: dict[int, Int64] = {0: np.zeros(len(phases[0].ratios), dtype=np.int64)}
        self._due_before: dict[int, Ratios] = {0: (Fraction(0),) * len(phases[0].ratios)}

    def phase_of(self, sample: int) -> int:
        """Number, from 0, of the phase that holds a sample; at the very end, the last."""
        return bisect.bisect_right(self.starts, sample) - 1

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """Source of each sample, and how many samples of that source came before it. int64 [N] -> int64 [N], int64 [N]."""
        assert self.samples is None or samples.size == 0 or int(samples.max()) < self.samples, "beyond the last phase"
        if len(self._tracks) == 1:
            return self._tracks[0].locate(samples)
        numbers = np.searchsorted(self.starts, samples, side="right") - 1
        sources, occurrences = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            source, occurrence = self._tracks[number].locate(samples[chosen] - self.starts[number])
            sources[chosen], occurrences[chosen] = source, occurrence + self._counts_before(number)[source]
        return sources, occurrences

    def counts(self, samples: int) -> Int64:
        """int64 [K]: samples of each source among the first `samples`."""
        assert samples >= 0 and (self.samples is None or samples <= self.samples), "beyond the last phase"
        number = self.phase_of(samples)
        return self._counts_before(number) + self._tracks[number].counts(samples - self.starts[number])

    def due(self, samples: int) -> Ratios:
        """[K] exact share of each source in the first `samples` samples, in samples."""
        number = self.phase_of(samples)
        for known in range(len(self._due_before), number + 1):
            part = self._tracks[known - 1].due(self.starts[known] - self.starts[known - 1])
            self._due_before[known] = _sum(self._due_before[known - 1], part)
        return _sum(self._due_before[number], self._tracks[number].due(samples - self.starts[number]))

    def describe_until(self, samples: int, names: Sequence[str]) -> list[Any]:
        """All that determines the first `samples` samples: the phases begun before, of a fixed one not the end.

        Sources that a phase does not use are left out of it, so that sources may be added for what follows.
        """
        described: list[Any] = []
        for phase, start in zip(self.phases, self.starts, strict=True):
            if start >= samples:
                break
            if phase.ramp_to is None:
                shares = [[name, str(ratio)] for name, ratio in zip(names, phase.ratios, strict=True) if ratio]
                described.append([start, shares])
            else:
                ends = zip(names, phase.ratios, phase.ramp_to, strict=True)
                line = [[name, str(first), str(last)] for name, first, last in ends if first or last]
                described.append([start, line, phase.line or phase.samples, phase.blocks])
        return described

    def _counts_before(self, number: int) -> Int64:
        """[K] samples of each source before phase `number`, from those before it."""
        for known in range(len(self._before), number + 1):
            length = self.starts[known] - self.starts[known - 1]
            self._before[known] = self._before[known - 1] + self._tracks[known - 1].counts(length)
        return self._before[number]


def _sum(one: Ratios, other: Ratios) -> Ratios:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def whole_samples(tokens: int, sequence_length: int) -> int:
    """Tokens as samples: to the nearest, halves up."""
    return (2 * tokens + sequence_length) // (2 * sequence_length)


def phases_of(data: DataConfig, sequence_length: int) -> tuple[Phase, ...]:
    """The phases of a configuration, in samples; empty when its mixture is fixed.

    A phase ends at the whole sample nearest to its end in tokens since the run began, so that roundings do not add up.

    Raises:
        UserError: a phase is shorter than a sample, or a ramp cannot be made.
    """
    names = list(data.sources)
    phases: list[Phase] = []
    start = 0
    for number, (phase, tokens) in enumerate(zip(data.phases, data.phase_ends, strict=True)):
        end = None if tokens is None else whole_samples(tokens, sequence_length)
        if end is not None and end <= start:
            raise UserError(
                f"data.phases.{number}: ends at token {tokens}, which is sample {end} of {sequence_length} tokens, and begins "
                f"at sample {start}: make it longer"
            )
        samples = None if end is None else end - start
        first, last, blocks, line = data.phase_ratios(phase), None, 1, None
        if phase.ramp is not None:
            first, last, blocks = phase.ramp.start, phase.ramp.end, phase.ramp.blocks
            line = None if phase.ramp.until is None else whole_samples(phase.ramp.until, sequence_length) - start
            line = None if line == samples else line
        ratios = tuple(first.get(name, Fraction(0)) for name in names)
        ramp_to = None if last is None else tuple(last.get(name, Fraction(0)) for name in names)
        found = Phase(samples, ratios, ramp_to, blocks, line)
        try:
            Schedule([found])
        except UserError as error:
            raise UserError(f"data.phases.{number}: {error}") from None
        phases.append(found)
        start = end if end is not None else start
    return tuple(phases)
