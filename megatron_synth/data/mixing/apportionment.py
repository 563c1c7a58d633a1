"""Which source each sample comes from: the chairman assignment problem, solved exactly.

Given K sources with ratios r_j > 0 that sum to 1, find a sequence in which, after *every* prefix of n samples, each
source's count x_j(n) is as near as possible to n r_j. R. Tijdeman, "The chairman assignment problem", Discrete
Mathematics 32 (1980) 323-330: there is always one with

    |x_j(n) - n r_j| <= 1 - e   for all n and j,      e = 1 / (2K - 2),

and no smaller bound holds for all ratios.

**The rule.** The bound is a window in time for each occurrence. Sample number k + 1 of source j (k = 0, 1, ...) may
come at step n (counted from 1) only if k + 1 - n r_j <= 1 - e, and must have come at step n if n r_j - k > 1 - e:

    release  = ceil((k + e) / r_j),      deadline = floor((k + 1 - e) / r_j) + 1.

At each step take, among the released occurrences, the one with the earliest deadline (ties: the lower source number).

**Why it works.** Someone is always released: if n r_j - x_j(n-1) < e for all j, then their sum, which is 1, would be
below K e <= 1. Earliest deadline first meets all deadlines of unit jobs with whole-numbered windows if no interval of
steps [s, t] must hold more jobs than it has steps. Source j must place in it each k + 1 between (s-1) r_j + 1 - e and
t r_j + e, both excluded: N_j = (t-s+1) r_j + u_j + v_j of them, or 0 where that is negative, with

    u_j = ceil(t r_j + e) - 1 - t r_j < e,      v_j = (s-1) r_j - 1 - floor((s-1) r_j - e) < e.

If no N_j is negative: the u_j sum to an integer, since the t r_j sum to t, and to less than K e <= 1, hence to at
most 0, and so do the v_j; the jobs number at most t-s+1. Otherwise at most K-1 sources have jobs, and these number
less than (t-s+1) + 2 (K-1) e = (t-s+1) + 1: again at most t-s+1.

**Why nothing is better.** Let one source have the tiny ratio d and K-1 others share the rest equally. As long as the
rare one has not come, step (K-1) m + 1 gives some other source m + 1 samples where m + (1 - n d) / (K-1) are due;
once it has come, at step (K-1) m some other has at most m - 1 where m - n d / (K-1) are due. The first is off by more
than 1 - e when n d > 1/2, the second when n d < 1/2; so some step is off by 1 - e, up to terms that vanish with d.

At the common denominator M of the ratios the counts are exact and the state is that of the start: the period is M.

**Beginning anywhere.** The counts after n steps follow from any counts after m < n steps from which all later deadlines
can be met, if m is early enough. Let two runs of the rule, A and B, begin with such counts after step m. Call a job own to
a run if only it has yet to do it. In a step that does x in A and y in B, x before y, x is own to A, as B would have done it
otherwise; if y is own to B, both lose one, else y becomes own to A in place of x, and comes before all that is own to B.
So the latest of the own jobs never becomes later, and after its deadline there is none: A = B. Own after step m can only
be jobs that are released by m and not due by m. So it is enough that every job due after n is released after m:

    m = min_j release(j's first job that is due after n) - 1,       n - m <= (1 - 2 e) / min_j r_j + 1.

Counts after step m from which all deadlines can be met: m r_j rounded down, and then up for as many sources as it takes for
a sum of m, by the earliest deadlines of their next jobs, among those whose next job is released (m r_j is at least e above
its whole part). They are enough, as the largest counts allowed sum to at least m; and all that are due are among them,
as the smallest sum to at most m. Let d_j be the jobs of j due by step t > m, d_j < t r_j + e, and c_j its count after m. If
no d_j < c_j, the jobs that are due number at most t - m, since the d_j sum to at most t. Otherwise some source with
d_i < c_i was rounded up for a deadline after t; so those that could have been and were not have later ones, and nothing due
by t. At most K-1 sources are left, rounded up, with d_j - c_j < (t-m) r_j + e, or not released, m r_j - c_j < e, with
d_j - c_j < (t-m) r_j + 2 e: together less than (t-m) + 2 (K-1) e = (t-m) + 1, hence at most t - m.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError

Int64 = npt.NDArray[np.int64]

SEGMENT_LENGTH = 1 << 11
"""Samples per table: some milliseconds."""
MAX_DENOMINATOR = 10**9
"""Largest denominator of one ratio: bounds every product in a table below 2**63."""
MAX_SOURCES = 256
_TABLES_KEPT = 1 << 10  # together 2 million samples and 30 MB: all of ratios with up to six decimal digits
_MARK_EVERY = 1 << 8  # tables, half a million samples
_SMALL_PERIOD = 1 << 14
_WALK = 1 << 13  # steps walked rather than looking for one without a choice
_FEW = 8  # sources, of which all have no choice now and then
_LOOK_LENGTH, _LOOK_BACK = 1 << 11, 1 << 15  # steps searched at once and at most for one without a choice
_MAX_SEGMENT_LENGTH = 1 << 20  # with 2 x MAX_SOURCES x MAX_DENOMINATOR a number below 2**63
_SAMPLES_LIMIT = 1 << 62


@dataclass(frozen=True, eq=False)
class _Segment:
    """The sequence from one position of the period on."""

    counts_before: Int64
    """[K] samples of each source in the period before this segment."""
    counts_after: Int64
    """[K] samples of each source in the period up to and with this segment."""
    order: npt.NDArray[np.uint16]
    """[L] source of each sample."""
    rank: npt.NDArray[np.int32]
    """[L] how many samples of the same source came before it in this segment."""
    positions: list[npt.NDArray[np.intp]]
    """Per source, ascending positions in this segment."""


class Apportionment:
    """The sequence of sources for fixed ratios: sample n -> (source, occurrence), and prefix -> counts.

    Tables are built on first use, `SEGMENT_LENGTH` samples at a time, and the last thousand are kept. A table begins with
    the counts at its first sample. They follow from a walk over the 1 / min r_j samples before it, from counts as stated
    above: any sample is found in milliseconds while no ratio is below 10^-4. A ratio r that is smaller takes 1 / r
    microseconds once, for the first sample far from those before, unless the bound leaves one choice nearer by: a step at
    which the smallest counts that it allows, ceil(n r_j - 1 + e), or the largest sum to n. With few sources there is one.
    """

    def __init__(self, ratios: Sequence[Fraction], *, segment_length: int = SEGMENT_LENGTH):
        """ratios: [K], each in [0, 1], together 1 (else UserError). A source with ratio 0 never comes."""
        assert segment_length <= _MAX_SEGMENT_LENGTH
        check_ratios(ratios)
        self.ratios = tuple(ratios)
        self._active = [source for source, ratio in enumerate(ratios) if ratio > 0]
        # 1 / e; a single source (e = 1) has windows of one step
        self._inverse_slack = max(1, 2 * len(self._active) - 2)
        self.period = math.lcm(*(ratio.denominator for ratio in ratios))
        # no sample lies beyond the limit, so that a longer period never ends and its counts are never needed
        self._reachable = min(self.period, _SAMPLES_LIMIT)
        endless = self.period > _SAMPLES_LIMIT
        self._per_period = np.array([0 if endless else int(ratio * self.period) for ratio in ratios], dtype=np.int64)
        self._segment_length = segment_length
        # written once per key, with a value that depends on the key alone: threads may share the object
        self._marks: dict[int, Int64] = {0: np.zeros(len(ratios), dtype=np.int64)}
        """Counts before some segments, kept for good."""
        self._segments: dict[int, _Segment] = {}

    @property
    def bound(self) -> Fraction:
        """No count is farther from its share after any prefix: 1 - 1 / (2K - 2), K counting the sources in use."""
        return 1 - Fraction(1, self._inverse_slack)

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """Source of each sample, and how many samples of that source came before it.

        samples: int64 [N], each >= 0, in any order. Returns int64 [N], int64 [N].
        """
        samples = np.asarray(samples, dtype=np.int64)
        assert samples.size == 0 or int(samples.min()) >= 0, "samples are counted from 0"
        periods, positions = np.divmod(samples, self._reachable)
        sources = np.empty(samples.shape, dtype=np.int64)
        occurrences = np.empty(samples.shape, dtype=np.int64)
        numbers = positions // self._segment_length
        for number in np.unique(numbers).tolist():
            segment = self._segment(number)
            chosen = numbers == number
            inside = positions[chosen] - number * self._segment_length
            source = segment.order[inside].astype(np.int64)
            sources[chosen] = source
            occurrences[chosen] = (
                periods[chosen] * self._per_period[source] + segment.counts_before[source] + segment.rank[inside]
            )
        return sources, occurrences

    def counts(self, samples: int) -> Int64:
        """int64 [K]: samples of each source among the first `samples`."""
        assert samples >= 0
        periods, position = divmod(samples, self._reachable)
        if position == 0:  # whole periods need no table
            return periods * self._per_period
        segment = self._segment(position // self._segment_length)
        inside = position % self._segment_length
        within = [np.searchsorted(positions, inside) for positions in segment.positions]
        counts: Int64 = periods * self._per_period + segment.counts_before + np.array(within, dtype=np.int64)
        return counts

    def _segment(self, number: int, before: Int64 | None = None) -> _Segment:
        """Segment `number` of the period; before: [K] counts at its start, if they are known."""
        segment = self._segments.get(number)
        if segment is None:
            first = number * self._segment_length
            length = min(self._segment_length, self._reachable - first)
            segment = self._build(first, length, self._start(number) if before is None else before)
            self._segments[number] = segment
            for oldest in list(self._segments)[:-_TABLES_KEPT]:
                self._segments.pop(oldest, None)
            if number % _MARK_EVERY == 0:
                self._marks[number] = segment.counts_before
        return segment

    def _start(self, number: int) -> Int64:
        """[K] counts before segment `number`: from the one before it, from a step without a choice, or in order."""
        previous = self._segments.get(number - 1)
        if previous is not None:
            return previous.counts_after
        first, nearest = number * self._segment_length, max(mark for mark in list(self._marks) if mark <= number)
        early = self._early_enough(first)
        distance = first - max(early, nearest * self._segment_length)
        if distance > _WALK and len(self._active) <= _FEW:
            for begin in range(0, min(_LOOK_BACK, distance // 2), _LOOK_LENGTH):
                found = self._forced(first - begin)
                if found is not None:
                    return self._walk(*found, first)
        if early > nearest * self._segment_length:
            return self._walk(early, self._rounded(early), first)
        counts = self._marks[nearest]
        for missing in range(nearest, number):
            counts = self._segment(missing, counts).counts_after
        return counts

    def _walk(self, step: int, counts: Int64, last: int) -> Int64:
        """[K] counts after `last` steps, from those after `step`."""
        while step < last:
            length = min(_WALK, last - step)
            order, _ = self._order(step, length, counts)
            counts, step = counts + np.bincount(order, minlength=len(counts)), step + length
        return counts

    def _early_enough(self, last: int) -> int:
        """The latest step, up to `last`, whose counts the counts after `last` do not depend on."""
        q, early = self._inverse_slack, last
        for source in self._active:
            p, d = self.ratios[source].numerator, self.ratios[source].denominator
            due = max(0, -((d * (q - 1) - last * p * q) // (d * q)))  # ceil(last r - 1 + e)
            early = min(early, -(-(due * q + 1) * d // (p * q)) - 1)  # ceil((due + e) / r) - 1
        return early

    def _rounded(self, step: int) -> Int64:
        """[K] counts after `step` from which all later deadlines can be met."""
        counts, released = np.zeros(len(self.ratios), dtype=np.int64), []
        for source in self._active:
            p, d, q = self.ratios[source].numerator, self.ratios[source].denominator, self._inverse_slack
            down, above = divmod(step * p, d)
            counts[source] = down
            if above * q >= d:
                released.append((((down + 1) * q - 1) * d // (p * q), source))
        for _, source in sorted(released)[: step - int(counts.sum())]:
            counts[source] += 1
        return counts

    def _forced(self, last: int) -> tuple[int, Int64] | None:
        """The latest of the steps up to `last` after which the counts can be no others, and these counts.

        Looks at `_LOOK_LENGTH` steps. Python integers move the origin to `last`; what is left stays below 2**63.
        """
        back = np.arange(min(_LOOK_LENGTH, last + 1), dtype=np.int64)
        smallest, largest = [np.zeros((len(self.ratios), len(back)), dtype=np.int64) for _ in range(2)]
        # counts relative to the whole part at `last`, so that sums stay small
        whole = [int(last * ratio) for ratio in self.ratios]
        for source in self._active:
            p, d, q = self.ratios[source].numerator, self.ratios[source].denominator, self._inverse_slack
            origin = (last * p - whole[source] * d) * q
            smallest[source] = -((d * (q - 1) - origin + back * (p * q)) // (d * q))
            largest[source] = (origin + d * (q - 1) - back * (p * q)) // (d * q)
        for counts in (smallest, largest):
            hits = np.flatnonzero(counts.sum(axis=0) + back == last - sum(whole))
            if hits.size:
                step = int(hits[0])
                return last - step, counts[:, step] + np.array(whole, dtype=np.int64)
        return None

    def _build(self, first: int, length: int, before: Int64) -> _Segment:
        """The `length` samples after the first `first`, from the counts at their start."""
        order, windows = self._order(first, length, before)
        grouped = np.argsort(order, kind="stable")
        taken = np.bincount(order, minlength=len(self.ratios))
        ends = np.cumsum(taken)
        rank = np.empty(length, dtype=np.int32)
        rank[grouped] = np.arange(length) - np.repeat(ends - taken, taken)
        positions = np.split(grouped, ends[:-1])
        for index, (opens, closes) in zip(self._active, windows, strict=True):
            steps = positions[index] + 1
            # the theorem, checked on the table itself: each occurrence is in its window, none that was due is missing
            assert np.all(opens[: len(steps)] <= steps) and np.all(steps <= closes[: len(steps)])
            assert np.all(closes[len(steps) :] > length)
        return _Segment(before, before + taken, order, rank, positions)

    def _order(self, first: int, length: int, before: Int64) -> tuple[npt.NDArray[np.uint16], list[tuple[Int64, Int64]]]:
        """Earliest deadline first: [L] source of each sample; of each source in use, releases and deadlines in these steps."""
        windows = [self._windows(source, first, length, int(before[source])) for source in self._active]
        release = np.concatenate([opens for opens, _ in windows])
        deadline = np.concatenate([closes for _, closes in windows])
        source = np.repeat(np.array(self._active, dtype=np.int64), [len(opens) for opens, _ in windows])
        by_release = np.argsort(release, kind="stable")
        jobs = (deadline * MAX_SOURCES + source)[by_release]
        return _earliest_deadline_first(release[by_release], jobs, length), windows

    def _windows(self, source: int, first: int, length: int, count: int) -> tuple[Int64, Int64]:
        """Release and deadline, in steps after `first`, of a source's occurrences `count`, `count` + 1, ...

        Only of those released within `length` steps. With r = p / d and e = 1 / q, (k + e) / r = (k q + 1) d / (q p).
        Python integers move the origin to `first`; what is left stays near length x q p < 2**63.
        """
        p, d, q = self.ratios[source].numerator, self.ratios[source].denominator, self._inverse_slack
        origin = (count * q + 1) * d - first * q * p
        # release <= length  <=>  origin + i q d <= length q p
        number = max(0, (length * q * p - origin) // (q * d) + 1)
        opens = origin + np.arange(number, dtype=np.int64) * (q * d)
        closes = opens + (q - 2) * d  # (k + 1 - e) - (k + e) = (q - 2) / q
        return -(-opens // (q * p)), closes // (q * p) + 1


def apportionment(ratios: tuple[Fraction, ...]) -> Apportionment:
    """The sequence for these ratios; one object, with its tables, per set of ratios, while it is among the last used."""
    small = math.lcm(*(ratio.denominator for ratio in ratios)) <= _SMALL_PERIOD
    return _small(ratios) if small else _large(ratios)


@functools.lru_cache(maxsize=256)
def _small(ratios: tuple[Fraction, ...]) -> Apportionment:
    return Apportionment(ratios)


@functools.lru_cache(maxsize=8)
def _large(ratios: tuple[Fraction, ...]) -> Apportionment:
    return Apportionment(ratios)


def _earliest_deadline_first(release: Int64, job: Int64, length: int) -> npt.NDArray[np.uint16]:
    """Source of each of the steps 1..`length`. `release` ascends; `job` = deadline * MAX_SOURCES + source."""
    released = np.searchsorted(release, np.arange(1, length + 1), side="right").tolist()
    jobs = job.tolist()
    heap: list[int] = []
    chosen: list[int] = []
    push, pop, choose, done = heapq.heappush, heapq.heappop, chosen.append, 0
    for available in released:
        while done < available:
            push(heap, jobs[done])
            done += 1
        choose(pop(heap))
    return (np.array(chosen, dtype=np.int64) % MAX_SOURCES).astype(np.uint16)


def check_ratios(ratios: Sequence[Fraction]) -> None:
    """Refuse (UserError) what is not the ratios of a mixture: each in [0, 1], together exactly 1, of sane size."""
    if not 1 <= len(ratios) <= MAX_SOURCES:
        raise UserError(f"a mixture has 1 to {MAX_SOURCES} sources, this one has {len(ratios)}")
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise UserError(f"a ratio lies between 0 and 1, found {ratio}")
        if ratio.denominator > MAX_DENOMINATOR:
            raise UserError(
                f"ratio {ratio} has a denominator above {MAX_DENOMINATOR}: write it as a short fraction such as 1/3, "
                "or with at most nine decimal digits"
            )
    total = sum(ratios, start=Fraction(0))
    if total != 1:
        raise UserError(
            f"the ratios sum to {total} (about {float(total):.9g}), not to exactly 1; the difference is {total - 1}: "
            "change one of them by that, or write repeating decimals as fractions such as 1/3"
        )
