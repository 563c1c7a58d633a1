"""Which window of which source sample n holds: a function of n alone.

Sample n is the k-th (from 0) of its source by `apportion`; a source of W windows shows them all once per epoch, in an
order that is a keyed permutation: epoch = k // W, window = permutation(seed, source name, epoch)(k % W). Nothing is
stored, and nothing depends on the layout, on the length of the run, or on where it was restarted. The order of a
source's windows is also independent of the ratios and of the other sources, so that runs that differ only in their
mixture see the same text of a source in the same order. Over several phases (`phases`) k counts on.

Of a source with a limit of U unique windows only those of the subset take part that another keyed permutation, of all
its W windows, takes 0 .. U - 1 to; k then counts passes over the subset. It depends on the seed, the name and W alone,
and a smaller limit is a part of a larger one.

Of a source with shifted windows, window w of an epoch begins w windows after the epoch's offset, a keyed number below the
length L of a window, instead of after 0. All epochs have as many windows as fit at every offset, floor(T / L) - 1 of a
stream of T tokens, which is at most one less than without: so k says the epoch without a look at those before. What an
epoch leaves out, less than L tokens at the beginning and less than 2 L in all, is another part in each.

Samples may be left out (`skips`): the others keep their numbers and windows. What a run has consumed is then a number of
samples that stay, and counts are those of the plan less what is left out.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.data.mixing.permutation import UInt64, derive_key, permute
from megatron_synth.data.mixing.schedule import Phase, Schedule
from megatron_synth.data.mixing.skips import Skips

Int64 = npt.NDArray[np.int64]

ORDER_VERSION = 1
"""Raised whenever the order of samples changes for equal inputs; part of the digest."""
_CHUNK = 1 << 14  # samples located at once: their round keys (128 bytes each) stay in cache


@dataclass(frozen=True)
class SourceSpec:
    """What the plan needs to know of a source."""

    name: str
    ratio: Fraction
    """Share of the samples, exact. Phases, where there are any, say it instead."""
    num_windows: int
    """Windows of L inputs and as many labels (`windows_in`): L + 1 tokens, neighbors sharing one."""
    max_epochs: float = 1.0
    """How often the source may be seen; `inf` for any number."""

    unique_windows: int | None = None
    """Use only so many of the windows. None: all."""
    shift: int = 0
    """Windows of an epoch begin at an offset of the epoch's own below this number of tokens; 0: at the first token."""

    @property
    def epoch_windows(self) -> int:
        """Windows of one epoch."""
        return self.num_windows if self.unique_windows is None else self.unique_windows

    @property
    def allowed_samples(self) -> int | None:
        """Samples that the source may give: floor(max_epochs x epoch_windows). None: any number."""
        if math.isinf(self.max_epochs):
            return None
        # repr names the number that the user typed: 0.29 x 100 is 29, though not in binary
        allowed = math.floor(Fraction(repr(self.max_epochs)) * self.epoch_windows)
        return None if allowed > 2**62 else allowed  # more than any run has


class MixturePlan:
    """The order of all samples of a run.

    names: per source, in the order of the source ids. ratios: per source, at the start of the run.
    schedule: the sources of all samples, and their counts; its module states the bounds of deviation.
    """

    def __init__(
        self, sources: Sequence[SourceSpec], seed: int, phases: Sequence[Phase] = (), skips: Sequence[tuple[int, int]] = ()
    ):
        """Without phases each source's own ratio holds for ever. skips: ranges [first, last] of samples that are left out.

        Refuses (UserError) repeated names, ratios that do not sum to 1, sources without a single window, and limits of
        unique windows that a source cannot fill.
        """
        self.sources = tuple(sources)
        self.seed = seed
        self.skips = Skips(skips)
        self.names = tuple(source.name for source in sources)
        self.phased = bool(phases)
        """Whether the mixture is made of phases; otherwise each source's ratio is fixed."""
        repeated = sorted(name for name, times in Counter(self.names).items() if times > 1)
        if repeated:
            raise UserError(f"data.sources: each source needs its own name; more than once: {', '.join(repeated)}")
        empty = [source.name for source in sources if source.num_windows < 1]
        if empty:
            raise UserError(
                f"data.sources: {', '.join(empty)}: not one full window: a source needs more tokens than a window has, "
                "train.sequence_length / data.windows_per_sequence, and twice as many with shift_windows; use a larger source "
                "or smaller windows"
            )
        for source in sources:
            if not 1 <= source.epoch_windows <= source.num_windows:
                raise UserError(
                    f"data.sources.{source.name}.unique_tokens: gives {source.epoch_windows} whole windows, the source has "
                    f"{source.num_windows}: set it to 1 to {source.num_windows} times the tokens of a window, or to null "
                    "for all"
                )
        self._epoch_windows = np.array([source.epoch_windows for source in sources], dtype=np.int64)
        assert not any(source.shift and source.unique_windows is not None for source in sources), "the subset would not hold"
        self._shifted = [number for number, source in enumerate(sources) if source.shift]
        self._limited = [number for number, source in enumerate(sources) if source.epoch_windows != source.num_windows]
        if not phases:
            phases = [Phase(None, tuple(source.ratio for source in sources))]
        self.ratios = phases[0].ratios
        try:
            self.schedule = Schedule(phases)
        except UserError as error:
            listed = ", ".join(f"{source.name} {source.ratio}" for source in sources)
            raise UserError(f"data.sources ({listed}): {error}") from None

    @property
    def samples(self) -> int | None:
        """Most samples that a run of the plan consumes. None: it has no end."""
        return None if self.schedule.samples is None else self.skips.position(self.schedule.samples)

    @property
    def num_windows(self) -> tuple[int, ...]:
        """Windows of each source."""
        return tuple(source.num_windows for source in self.sources)

    @property
    def epoch_windows(self) -> tuple[int, ...]:
        """Windows of one epoch of each source."""
        return tuple(source.epoch_windows for source in self.sources)

    def occurrences(self, samples: npt.ArrayLike) -> tuple[Int64, Int64]:
        """Source id of each sample, and how many samples of that source came before it. int64 [N] -> int64 [N] twice.

        What `locate` maps to windows: an occurrence k is in epoch k // epoch_windows.
        """
        return self.schedule.locate(np.asarray(samples, dtype=np.int64))

    def locate(self, samples: npt.ArrayLike) -> tuple[Int64, Int64]:
        """Source id and window of each sample. samples: int64 [N], any order. Returns int64 [N], int64 [N]."""
        return self.places(samples)[:2]

    def places(self, samples: npt.ArrayLike) -> tuple[Int64, Int64, Int64]:
        """Source id and window of each sample, and the token at which window 0 of its epoch begins: int64 [N] each."""
        numbers = np.asarray(samples, dtype=np.int64)
        assert numbers.ndim == 1
        source_ids = np.empty(len(numbers), dtype=np.int64)
        windows = np.empty(len(numbers), dtype=np.int64)
        offsets = np.zeros(len(numbers), dtype=np.int64)
        for start in range(0, len(numbers), _CHUNK):
            part = slice(start, start + _CHUNK)
            source_ids[part], windows[part] = self._locate(numbers[part], offsets[part])
        return source_ids, windows, offsets

    def _locate(self, samples: Int64, offsets: Int64) -> tuple[Int64, Int64]:
        """Source id and window of each sample; `offsets`, zeros, are filled where windows are shifted."""
        source_ids, occurrences = self.schedule.locate(samples)
        sizes = self._epoch_windows[source_ids]
        epochs, places = np.divmod(occurrences, sizes)
        # one key per (source, epoch) that occurs
        pairs, which = np.unique(epochs * len(self.sources) + source_ids, return_inverse=True)
        keys = []
        for pair in pairs.tolist():
            epoch, source_id = divmod(pair, len(self.sources))
            keys.append(_epoch_key(self.seed, self.names[source_id], epoch))
        if len(keys) == 1:
            windows = permute(places, int(sizes[0]), keys[0])
        else:
            windows = permute(places, sizes, np.stack(keys, axis=1)[:, which])
        for source_id in self._limited:
            chosen = source_ids == source_id
            if chosen.any():
                source = self.sources[source_id]
                windows[chosen] = permute(windows[chosen], source.num_windows, _subset_key(self.seed, source.name))
        for source_id in self._shifted:
            chosen = np.flatnonzero(source_ids == source_id)
            source = self.sources[source_id]
            numbers, which = np.unique(epochs[chosen], return_inverse=True)
            own = [_epoch_offset(self.seed, source.name, epoch, source.shift) for epoch in numbers.tolist()]
            offsets[chosen] = np.array(own, dtype=np.int64)[which]
        return source_ids, windows

    def counts(self, samples: int) -> Int64:
        """int64 [K]: samples of each source among the first `samples` consumed; costs the same for any number."""
        counts = self.schedule.counts(self.skips.end(samples))
        for first, last in self.skips.until(samples):
            counts = counts - (self.schedule.counts(last + 1) - self.schedule.counts(first))
        return counts

    def due(self, samples: int) -> tuple[Fraction, ...]:
        """[K] exact share of each source in the first `samples` consumed, in samples."""
        due = self.schedule.due(self.skips.end(samples))
        for first, last in self.skips.until(samples):
            ends = self.schedule.due(last + 1), self.schedule.due(first)
            due = tuple(whole - (after - before) for whole, after, before in zip(due, *ends, strict=True))
        return due

    def overall_ratios(self, samples: int) -> tuple[Fraction, ...]:
        """[K] exact share that the phases give each source of the first `samples` samples."""
        if not self.phased or samples == 0:
            return self.ratios
        return tuple(share / samples for share in self.due(samples))

    def required_windows(self, total_samples: int) -> dict[str, int]:
        """Windows, repeats included, that a run of `total_samples` takes from each source."""
        return dict(zip(self.names, self.counts(total_samples).tolist(), strict=True))

    def check(self, total_samples: int, window_length: int | None = None, consumed: int = 0) -> None:
        """Refuse (UserError) a run longer than its phases, or that would repeat a source more than its max_epochs.

        All such sources at once. window_length: only to name the sizes in tokens too. consumed: samples of the run that
        are behind it, in steps of whatever size.
        """
        behind = f", {consumed} of them consumed" if consumed else ""

        def in_tokens(samples: int) -> str:
            return "" if window_length is None else f" ({samples * window_length} tokens)"

        end = self.samples
        if end is not None and end < total_samples:
            raise UserError(
                f"data.phases: end after {end} samples{in_tokens(end)}, the run has {total_samples}"
                f"{in_tokens(total_samples)}{behind}: leave `tokens` and `until` of the last phase out, or make the run "
                "shorter (train.steps x train.global_batch_size x data.windows_per_sequence)"
            )
        problems, longest_run = [], total_samples
        for source_id, needed in enumerate(self.counts(total_samples).tolist()):
            source = self.sources[source_id]
            allowed = source.allowed_samples
            if allowed is None or needed <= allowed:
                continue
            longest = self.longest_run(source_id)
            assert longest is not None
            longest_run = min(longest_run, longest)
            windows = source.epoch_windows
            enough = math.ceil(Fraction(needed * 1000, windows)) / 1000
            small = math.floor(Fraction(allowed * 10**6, total_samples)) / 10**6
            unique = "" if source.unique_windows is None else "unique "
            if self.phased:
                phase = self.schedule.phase_of(self.skips.number(longest))
                what = f"the phases need {needed} of {total_samples} samples"
                advice = f"Runs out after sample {longest}, in data.phases.{phase}: lower its share or set max_epochs to"
            else:
                what = f"ratio {source.ratio} of {total_samples} samples needs {needed}"
                advice = f"Lower its ratio to {small:.12g} or set max_epochs to"
            problems.append(
                f"  {source.name}: has {windows} {unique}windows{in_tokens(windows)}; {what}, {needed / windows:.3f} epochs; "
                f"max_epochs {source.max_epochs:.12g} allows {allowed}. {advice} {enough:.12g}"
            )
        if problems:
            raise UserError(
                "\n".join(
                    [
                        f"data.sources: too small for a run of {total_samples} samples{behind}:",
                        *problems,
                        f"  or train at most {longest_run} samples{behind} (train.steps, of train.global_batch_size x "
                        "data.windows_per_sequence each)",
                    ]
                )
            )

    def longest_run(self, source_id: int) -> int | None:
        """Most samples that a run can have without taking more of a source than it may give. None: any number."""
        allowed = self.sources[source_id].allowed_samples
        if allowed is None:
            return None

        def taken(samples: int) -> int:
            return int(self.counts(samples)[source_id])

        start = self.skips.position(self.schedule.starts[-1])
        if taken(start) > allowed:  # runs out before the last phase
            low, high = 0, start
        elif self.samples is not None:
            low, high = start, self.samples
        else:
            left, ratio = allowed - taken(start), self.schedule.phases[-1].ratios[source_id]
            if ratio == 0:
                return None
            # a count is less than one sample from its share, so the answer lies between these
            low, high = start + max(0, math.floor((left - 1) / ratio)), start + math.ceil((left + 2) / ratio)
            # what is left out may be of this source or of others
            low, high = max(start, low - self.skips.total), high + math.ceil((self.skips.total + 1) / ratio)
        if taken(high) <= allowed:
            return None
        return low + bisect.bisect_right(range(low, high + 1), allowed, key=taken) - 1

    def describe(self) -> str:
        """The mixture in one line: `web 2/3, qa 1/3`, or the first of several phases and how many follow."""
        shares = ", ".join(f"{name} {ratio}" for name, ratio in zip(self.names, self.ratios, strict=True) if ratio)
        number = len(self.schedule.phases)
        return shares if number == 1 and not self.phased else f"in {number} phases, from {shares}"

    def digest(self) -> str:
        """16 hex digits of all that determines the order: seed; name, ratio and windows of the sources, in order; phases."""
        sources = [[source.name, str(source.ratio), *_windows(source)] for source in self.sources]
        content: list[Any] = [ORDER_VERSION, self.seed, sources]
        if self.phased:
            content = [ORDER_VERSION, self.seed, [[name, *rest] for name, _, *rest in sources]]
            for phase in self.schedule.phases:
                ramp_to = None if phase.ramp_to is None else [*map(str, phase.ramp_to)]
                line = [] if phase.line is None else [phase.line]
                content.append([phase.samples, [*map(str, phase.ratios)], ramp_to, phase.blocks, *line])
        if self.skips:
            content.append(["skips", self.skips.ranges])
        return _hash(content)

    def prefix_names(self, samples: int) -> tuple[str, ...]:
        """Sources that the phases of the first `samples` samples use."""
        described = self.schedule.describe_until(self.skips.end(samples), self.names)
        used = {name for _, shares, *_ in described for name, *_ in shares}
        return tuple(name for name in self.names if name in used)

    def prefix_digest(self, samples: int) -> str:
        """16 hex digits of all that determines the first `samples` samples.

        Two plans with equal prefix digests have these samples in common, whatever follows: a phase that begins at
        sample `samples` or later, the end of the phase before it, and sources that are used only there do not count.
        """
        used = self.prefix_names(samples)
        sources = sorted([source.name, *_windows(source)] for source in self.sources if source.name in used)
        content = [ORDER_VERSION, self.seed, sources, self.schedule.describe_until(self.skips.end(samples), self.names)]
        left_out = self.skips.until(samples)
        if left_out:
            content.append(["skips", left_out])
        return _hash(["prefix", *content])


def windows_in(num_tokens: int, length: int, *, shifted: bool = False) -> int:
    """Windows of `length` inputs and as many labels that a stream of tokens has; shifted: from any offset below `length` on."""
    return max(num_tokens - (length if shifted else 1), 0) // length


def _windows(source: SourceSpec) -> list[int]:
    """What of a source's size decides its order."""
    whole = source.epoch_windows == source.num_windows
    if source.shift:
        return [source.num_windows, source.epoch_windows, source.shift]
    return [source.num_windows] if whole else [source.num_windows, source.epoch_windows]


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=4096)
def _epoch_key(seed: int, name: str, epoch: int) -> UInt64:
    return derive_key(seed, "window", name, epoch)


@functools.lru_cache(maxsize=4096)
def _epoch_offset(seed: int, name: str, epoch: int, shift: int) -> int:
    return int(derive_key(seed, "shift", name, epoch)[0]) % shift


@functools.lru_cache(maxsize=256)
def _subset_key(seed: int, name: str) -> UInt64:
    return derive_key(seed, "subset", name)
