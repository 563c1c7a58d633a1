"""Which window of which source sample n holds: a function of n alone.

Sample n is the k-th (from 0) of its source by `apportion`; a source of W windows shows them all once per epoch, in an
order that is a keyed permutation: epoch = k // W, window = permutation(seed, source name, epoch)(k % W). Nothing is
stored, and nothing depends on the layout, on the length of the run, or on where it was restarted. The order of a
source's windows is also independent of the ratios and of the other sources, so that runs that differ only in their
mixture see the same text of a source in the same order.
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

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.data.apportion import apportionment
from megatron_synth.data.permute import UInt64, derive_key, permute

Int64 = npt.NDArray[np.int64]

ORDER_VERSION = 1
"""Raised whenever the order of samples changes for equal inputs; part of the digest."""
_CHUNK = 1 << 14  # samples located at once: their round keys (128 bytes each) stay in cache


@dataclass(frozen=True)
class SourceSpec:
    """What the plan needs to know of a source."""

    name: str
    ratio: Fraction
    """Share of the samples, exact."""
    num_windows: int
    """Windows of sequence_length + 1 tokens, neighbours sharing one token."""
    max_epochs: float = 1.0
    """How often the source may be seen; `inf` for any number."""

    @property
    def allowed_samples(self) -> int | None:
        """Samples that the source may give: floor(max_epochs x num_windows). None: any number."""
        if math.isinf(self.max_epochs):
            return None
        # repr names the number that the user typed: 0.29 x 100 is 29, though not in binary
        return math.floor(Fraction(repr(self.max_epochs)) * self.num_windows)


class MixturePlan:
    """The order of all samples of a run.

    names, ratios: per source, in the order of the source ids.
    """

    def __init__(self, sources: Sequence[SourceSpec], seed: int):
        """Refuses (UserError) repeated names, ratios that do not sum to 1, and sources without a single window."""
        self.sources = tuple(sources)
        self.seed = seed
        self.names = tuple(source.name for source in sources)
        self.ratios = tuple(source.ratio for source in sources)
        repeated = sorted(name for name, times in Counter(self.names).items() if times > 1)
        if repeated:
            raise UserError(f"data.sources: each source needs its own name; more than once: {', '.join(repeated)}")
        empty = [source.name for source in sources if source.num_windows < 1]
        if empty:
            raise UserError(
                f"data.sources: {', '.join(empty)}: not one full window: a source needs at least "
                "train.sequence_length + 1 tokens; use a larger source or a smaller train.sequence_length"
            )
        self._num_windows = np.array([source.num_windows for source in sources], dtype=np.int64)
        try:
            self._apportionment = apportionment(self.ratios)
        except UserError as error:
            listed = ", ".join(f"{source.name} {source.ratio}" for source in sources)
            raise UserError(f"data.sources ({listed}): {error}") from None

    @property
    def num_windows(self) -> tuple[int, ...]:
        """Windows of each source."""
        return tuple(source.num_windows for source in self.sources)

    def locate(self, samples: npt.ArrayLike) -> tuple[Int64, Int64]:
        """Source id and window of each sample. samples: int64 [N], any order. Returns int64 [N], int64 [N]."""
        numbers = np.asarray(samples, dtype=np.int64)
        assert numbers.ndim == 1
        source_ids = np.empty(len(numbers), dtype=np.int64)
        windows = np.empty(len(numbers), dtype=np.int64)
        for start in range(0, len(numbers), _CHUNK):
            part = slice(start, start + _CHUNK)
            source_ids[part], windows[part] = self._locate(numbers[part])
        return source_ids, windows

    def _locate(self, samples: Int64) -> tuple[Int64, Int64]:
        source_ids, occurrences = self._apportionment.locate(samples)
        sizes = self._num_windows[source_ids]
        epochs, places = np.divmod(occurrences, sizes)
        # one key per (source, epoch) that occurs
        pairs, which = np.unique(epochs * len(self.sources) + source_ids, return_inverse=True)
        keys = []
        for pair in pairs.tolist():
            epoch, source_id = divmod(pair, len(self.sources))
            keys.append(_epoch_key(self.seed, self.names[source_id], epoch))
        if len(keys) == 1:
            return source_ids, permute(places, int(sizes[0]), keys[0])
        return source_ids, permute(places, sizes, np.stack(keys, axis=1)[:, which])

    def counts(self, samples: int) -> Int64:
        """int64 [K]: samples of each source among the first `samples`; costs the same for any number."""
        return self._apportionment.counts(samples)

    def required_windows(self, total_samples: int) -> dict[str, int]:
        """Windows, repeats included, that a run of `total_samples` takes from each source."""
        return dict(zip(self.names, self.counts(total_samples).tolist(), strict=True))

    def check(self, total_samples: int, sequence_length: int | None = None) -> None:
        """Refuse (UserError) a run that would repeat a source more than its max_epochs: all such sources at once.

        sequence_length: only to name the sizes in tokens too.
        """
        problems, longest_run = [], total_samples
        for source_id, needed in enumerate(self.counts(total_samples).tolist()):
            source = self.sources[source_id]
            allowed = source.allowed_samples
            if allowed is None or needed <= allowed:
                continue
            longest_run = min(longest_run, self._longest_run(source_id, allowed))
            tokens = "" if sequence_length is None else f" ({source.num_windows * sequence_length} tokens)"
            enough = math.ceil(Fraction(needed * 1000, source.num_windows)) / 1000
            small = math.floor(Fraction(allowed * 10**6, total_samples)) / 10**6
            problems.append(
                f"  {source.name}: has {source.num_windows} windows{tokens}; ratio {source.ratio} of {total_samples} "
                f"samples needs {needed}, {needed / source.num_windows:.3f} epochs; "
                f"max_epochs {source.max_epochs:.12g} allows {allowed}. "
                f"Lower its ratio to {small:.12g} or set max_epochs to {enough:.12g}"
            )
        if problems:
            raise UserError(
                "\n".join(
                    [
                        f"data.sources: too small for a run of {total_samples} samples:",
                        *problems,
                        f"  or train at most {longest_run} samples (train.steps x train.global_batch_size)",
                    ]
                )
            )

    def _longest_run(self, source_id: int, allowed: int) -> int:
        """Most samples that a run can have without taking more than `allowed` of a source."""
        ratio = self.ratios[source_id]
        # a count is less than one sample from its share, so the answer lies between these
        low, high = max(0, math.floor((allowed - 1) / ratio)), math.ceil((allowed + 2) / ratio)
        runs = range(low, high + 1)
        return low + bisect.bisect_right(runs, allowed, key=lambda samples: int(self.counts(samples)[source_id])) - 1

    def digest(self) -> str:
        """16 hex digits of all that determines the order: seed; name, ratio and windows of the sources, in order."""
        sources = [[source.name, str(source.ratio), source.num_windows] for source in self.sources]
        content = [ORDER_VERSION, self.seed, sources]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=4096)
def _epoch_key(seed: int, name: str, epoch: int) -> UInt64:
    return derive_key(seed, "window", name, epoch)
