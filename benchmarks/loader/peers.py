"""Loaders of mixtures, ours and others', behind one small interface.

Each gets the same four sources in the same shares and gives batches of B rows of tokens, int64, as torch tensors. Others
are used as their documentation shows for a weighted mixture of tokenized sources with a fixed seed, without worker
processes where they allow it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # an environment with other loaders need not have what ours needs
    from megatron_synth.data.loading.loader import Loader

ROWS = 8
"""B"""
SHARES = (Fraction(67, 100), Fraction(1, 5), Fraction(1, 10), Fraction(3, 100))
SEED = 1234
EOD = 50_000
VALUES = 12_000
"""Source k has tokens in [k VALUES, (k + 1) VALUES), and EOD: its rows can be told by their tokens."""


@dataclass(frozen=True)
class Sources:
    """Where the benchmark's data is, and how it is to be cut."""

    folder: Path
    sequence_length: int

    @property
    def prefixes(self) -> list[Path]:
        """Shard pairs of the sources."""
        return [self.folder / f"source-{number}" for number in range(len(SHARES))]

    @property
    def rows_folder(self) -> Path:
        """For those that read rows and not streams: a folder per sequence length."""
        return self.folder / f"rows-{self.sequence_length}"

    def stream(self, number: int) -> np.ndarray:
        """All tokens of a source, mapped."""
        return np.memmap(f"{self.prefixes[number]}.bin", dtype=np.uint16, mode="r")


class Stream(Protocol):
    """A loader at work."""

    def next(self) -> Tensor:
        """The next batch, int64 [B, S] or [B, S + 1]."""

    def state(self) -> Any:
        """What must be kept to go on from here."""

    def restore(self, state: Any) -> None:
        """Go on from there."""

    def close(self) -> None:
        """End threads and processes."""


class Indexed:
    """A stream whose state is the number of its next batch."""

    def __init__(self, batches: Callable[[int], Iterator[Tensor]], close: Callable[[], None] = lambda: None):
        self._make, self.close = batches, close
        self._batches, self._number = batches(0), 0

    def next(self) -> Tensor:  # noqa: D102
        self._number += 1
        return next(self._batches)

    def state(self) -> Any:  # noqa: D102
        return self._number

    def restore(self, state: Any) -> None:  # noqa: D102
        self._batches, self._number = self._make(state), state


# ---- ours


def _global_batch(sources: Sources) -> int:
    """Rows of an optimizer step: two million tokens; one batch where only the order matters."""
    return 512 if sources.sequence_length > 1000 else ROWS


def _our_loader(sources: Sources, **options: Any) -> Loader:
    from megatron_synth.data.loading.loader import Loader
    from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
    from megatron_synth.data.shards.source import open_source

    opened = [open_source(prefix, prefix.name) for prefix in sources.prefixes]
    length = sources.sequence_length
    specs = [
        SourceSpec(source.name, share, source.num_windows(length), math.inf)
        for source, share in zip(opened, SHARES, strict=True)
    ]
    return Loader(
        MixturePlan(specs, SEED),
        opened,
        sequence_length=length,
        micro_batch_size=ROWS,
        data_parallel_rank=0,
        data_parallel_size=1,
        **options,
    )


def _ours(sources: Sources, samples: int, *, arrays: bool = False, **options: Any) -> Stream:
    loader, size = _our_loader(sources, **options), _global_batch(sources)

    def batches(first: int) -> Iterator[Tensor]:
        # the run's length is no input: it only says which step is the first one
        step, skipped = divmod(first * ROWS, size)
        for number in itertools.count(step):
            rows = itertools.islice(loader.micro_batches(number * size, size), skipped // ROWS, None)
            skipped = 0
            for batch in rows:
                if arrays and batch.boundaries is not None:
                    batch.boundaries.position_ids()
                if batch.boundaries is not None:
                    batch.boundaries.loss_mask()
                yield torch.from_numpy(batch.tokens)

    return Indexed(batches)


def _ours_thread(sources: Sources, samples: int, **options: Any) -> Stream:
    from megatron_synth.data.loading.prefetch import Prefetcher

    loader, size = _our_loader(sources, **options), _global_batch(sources)
    prefetcher = Prefetcher(loader, size)

    def batches(first: int) -> Iterator[Tensor]:
        step, skipped = divmod(first * ROWS, size)
        for number in itertools.count(step):
            for batch in prefetcher.step(number * size)[skipped // ROWS :]:
                yield torch.from_numpy(batch.tokens)
            skipped = 0

    return Indexed(batches, prefetcher.close)


class _OurRows(torch.utils.data.IterableDataset[Tensor]):
    def __init__(self, sources: Sources, first: int):
        self._sources, self._first = sources, first

    def __iter__(self) -> Iterator[Tensor]:
        stream = _ours(self._sources, 0)
        stream.restore(self._first)
        while True:
            yield stream.next()


def _ours_worker(sources: Sources, samples: int) -> Stream:
    def batches(first: int) -> Iterator[Tensor]:
        return iter(torch.utils.data.DataLoader(_OurRows(sources, first), batch_size=None, num_workers=1))

    return Indexed(batches)


# ---- megatron-core


class _Tokenizer:
    eod = pad = EOD
    vocab_size = EOD + 1
    unique_identifiers: dict[str, str] = {"class": "benchmark"}


def _megatron(sources: Sources, samples: int, *, resets: bool = False) -> Stream:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=sources.sequence_length,
        blend=([str(prefix) for prefix in sources.prefixes], [float(share) for share in SHARES]),
        split="1,0,0",
        tokenizer=_Tokenizer(),  # type: ignore[arg-type]
        reset_position_ids=resets,
        reset_attention_mask=False,
        eod_mask_loss=resets,
        create_attention_mask=False,
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]

    def batches(first: int) -> Iterator[Tensor]:
        rows = range(first * ROWS, len(dataset))
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, rows), batch_size=ROWS, drop_last=True)
        return (batch["tokens"] for batch in loader)

    return Indexed(batches)


# ---- Hugging Face datasets


def _rows(sources: Sources) -> list[Any]:
    """Arrow files of rows of S tokens, made once."""
    from datasets import Dataset

    folder, length = sources.rows_folder, sources.sequence_length
    if not folder.exists():
        for number in range(len(SHARES)):
            tokens = sources.stream(number)
            tokens = tokens[: min(len(tokens) // length, 4000) * length].reshape(-1, length).astype(np.int64)
            Dataset.from_dict({"tokens": tokens}).save_to_disk(str(folder / str(number)))
    return [Dataset.load_from_disk(str(folder / str(number))) for number in range(len(SHARES))]


def _hf_map(sources: Sources, samples: int) -> Stream:
    from datasets import interleave_datasets

    # shuffled before they are repeated: then a longer run has the same beginning
    shuffled = [
        rows.shuffle(seed=SEED).repeat(math.ceil(samples * share / len(rows)) + 1)
        for rows, share in zip(_rows(sources), SHARES, strict=True)
    ]
    probabilities = [float(share) for share in SHARES]
    mixed = interleave_datasets(shuffled, probabilities=probabilities, seed=SEED, stopping_strategy="first_exhausted")
    mixed = mixed.with_format("torch")

    def batches(first: int) -> Iterator[Tensor]:
        return (mixed[at : at + ROWS]["tokens"][:] for at in range(first * ROWS, len(mixed) - ROWS + 1, ROWS))

    return Indexed(batches)


class _HfIterable:
    def __init__(self, sources: Sources, samples: int):
        from datasets import interleave_datasets

        streams = [rows.to_iterable_dataset().shuffle(seed=SEED, buffer_size=1000).repeat(None) for rows in _rows(sources)]
        probabilities = [float(share) for share in SHARES]
        self._mixed = interleave_datasets(streams, probabilities=probabilities, seed=SEED).with_format("torch")
        self._batched = self._mixed.batch(ROWS)
        self._rows = iter(self._batched)

    def next(self) -> Tensor:
        rows = next(self._rows)["tokens"]
        return torch.stack(list(rows)) if isinstance(rows, list) else rows

    def state(self) -> Any:
        return self._batched.state_dict()

    def restore(self, state: Any) -> None:
        self._batched.load_state_dict(state)
        self._rows = iter(self._batched)

    def close(self) -> None:
        """Nothing runs in the background."""


# ---- Grain


class _Windows:
    """A random-access source of Grain's: windows of a memory map."""

    def __init__(self, sources: Sources, number: int):
        self._tokens, self._length = sources.stream(number), sources.sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, window: int) -> np.ndarray:
        begin = int(window) * self._length
        return self._tokens[begin : begin + self._length + 1].astype(np.int64)


class _Grain:
    def __init__(self, sources: Sources, samples: int, *, threads: int):
        import grain  # type: ignore[import-not-found, unused-ignore]

        streams = [
            grain.MapDataset.source(_Windows(sources, number)).shuffle(seed=SEED + number).repeat()
            for number in range(len(SHARES))
        ]
        mixed = grain.MapDataset.mix(streams, weights=[float(share) for share in SHARES]).batch(ROWS)
        self._rows = iter(mixed.to_iter_dataset(grain.ReadOptions(num_threads=threads)))

    def next(self) -> Tensor:
        return torch.from_numpy(next(self._rows))

    def state(self) -> Any:
        return self._rows.get_state()

    def restore(self, state: Any) -> None:
        self._rows.set_state(state)

    def close(self) -> None:
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()


# ---- MosaicML Streaming


class _Mosaic:
    def __init__(self, sources: Sources, samples: int):
        from streaming import (  # type: ignore[import-not-found, unused-ignore]
            MDSWriter,
            Stream,
            StreamingDataLoader,
            StreamingDataset,
        )

        folder, length = sources.rows_folder.with_name(f"mds-{sources.sequence_length}"), sources.sequence_length
        if not folder.exists():
            for number in range(len(SHARES)):
                tokens = sources.stream(number)
                with MDSWriter(out=str(folder / str(number)), columns={"tokens": "ndarray"}) as writer:
                    for row in range(min(len(tokens) // length, 4000)):
                        writer.write({"tokens": tokens[row * length : (row + 1) * length].astype(np.int64)})
        streams = [Stream(local=str(folder / str(number)), proportion=float(share)) for number, share in enumerate(SHARES)]
        dataset = StreamingDataset(
            streams=streams, epoch_size=samples, shuffle=True, shuffle_seed=SEED, batch_size=ROWS, num_canonical_nodes=1
        )
        self._loader = StreamingDataLoader(dataset, batch_size=ROWS)
        self._rows = iter(self._loader)

    def next(self) -> Tensor:
        return next(self._rows)["tokens"]

    def state(self) -> Any:
        return self._loader.state_dict()

    def restore(self, state: Any) -> None:
        self._loader.load_state_dict(state)
        self._rows = iter(self._loader)

    def close(self) -> None:
        """Its threads are daemons."""


# ---- OLMo-core


class _Olmo:
    def __init__(self, sources: Sources, samples: int, *, threads: int):
        from olmo_core.data import TokenizerConfig  # type: ignore[import-not-found, unused-ignore]
        from olmo_core.data.composable import (  # type: ignore[import-not-found, unused-ignore]
            ComposableDataLoader,
            ConcatAndChunkInstanceSource,
            MixingInstanceSource,
        )

        length, folder = sources.sequence_length, sources.folder / "cache"
        tokenizer = TokenizerConfig(vocab_size=EOD + 1, eos_token_id=EOD, pad_token_id=EOD)
        specs = []
        for prefix, share in zip(sources.prefixes, SHARES, strict=True):
            file = str(prefix.with_name(f"{prefix.name}.bin"))
            chunks = ConcatAndChunkInstanceSource.Config.from_npy(
                file, tokenizer=tokenizer, sequence_length=length, dtype="uint16"
            )
            specs.append(
                MixingInstanceSource.Spec.Config(source=chunks, ratio=float(share), max_repetition_factor=float(samples))
            )
        mix = MixingInstanceSource.Config(source_specs=specs, num_instances=samples, seed=SEED).build(str(folder))
        config = ComposableDataLoader.Config(
            tokenizer=tokenizer,
            global_batch_size=ROWS * length,
            seed=SEED,
            num_threads=threads,
            display_source_visualization=False,
        )
        self._loader = config.build(mix, work_dir=str(folder))
        self._loader.reshuffle(1)
        self._rows = iter(self._loader)

    def next(self) -> Tensor:
        tokens: Tensor = next(self._rows)["input_ids"]
        return tokens

    def state(self) -> Any:
        return self._loader.state_dict()

    def restore(self, state: Any) -> None:
        self._loader.load_state_dict(state)
        self._loader.reshuffle(1)
        self._rows = iter(self._loader)

    def close(self) -> None:
        """Its threads end with the process."""


DISTRIBUTIONS = {
    "megatron.core": "megatron-core",
    "grain": "grain",
    "datasets": "datasets",
    "olmo_core": "ai2-olmo-core",
    "streaming": "mosaicml-streaming",
}
"""Where modules come from."""


@dataclass(frozen=True)
class Contender:
    """A loader and what it needs."""

    name: str
    open: Callable[[Sources, int], Stream]
    needs: str | None = None
    """A module, one of DISTRIBUTIONS; None for ours."""
    sizes: tuple[int, ...] = (10**5, 10**7)
    """Lengths of a run, in samples, at which it is built."""

    @property
    def missing(self) -> bool:
        """Whether the package that it needs is not installed."""
        try:
            return self.needs is not None and importlib.util.find_spec(self.needs) is None
        except ModuleNotFoundError:  # the package round it is missing
            return True

    @property
    def package(self) -> str | None:
        """Name and version of what it needs, as installed here; None for ours."""
        if self.needs is None:
            return None
        name = DISTRIBUTIONS[self.needs]
        return f"{name} {importlib.metadata.version(name)}"


_LONG = (10**5, 10**7, 10**12)


def _with(make: Callable[..., Stream], **options: Any) -> Callable[[Sources, int], Stream]:
    return lambda sources, samples: make(sources, samples, **options)


CONTENDERS = (
    Contender("ours", _ours, sizes=_LONG),
    Contender("ours, int32", _with(_ours, dtype=np.int32), sizes=_LONG),
    Contender("ours, cu_seqlens and loss mask", _with(_ours, with_boundaries=True), sizes=_LONG),
    Contender("ours, position ids too", _with(_ours, with_boundaries=True, arrays=True), sizes=_LONG),
    Contender("ours, prefetch thread", _ours_thread, sizes=_LONG),
    Contender("ours, DataLoader with 1 worker", _ours_worker, sizes=_LONG),
    Contender("megatron-core GPTDataset", _megatron, "megatron.core"),
    Contender("megatron-core, document resets", _with(_megatron, resets=True), "megatron.core"),
    Contender("Grain, no threads", _with(_Grain, threads=0), "grain"),
    Contender("Grain, 16 threads", _with(_Grain, threads=16), "grain"),
    Contender("Hugging Face datasets, map", _hf_map, "datasets"),
    Contender("Hugging Face datasets, iterable", _HfIterable, "datasets"),
    Contender("OLMo-core, no threads", _with(_Olmo, threads=0), "olmo_core"),
    Contender("OLMo-core, 4 threads", _with(_Olmo, threads=4), "olmo_core"),
    Contender("MosaicML Streaming", _Mosaic, "streaming"),
)
"""All, in the order of the table."""
