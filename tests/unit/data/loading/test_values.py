"""Values of documents, label by label, held against a plain loop; and which values have a name of their own."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.expression import parse
from megatron_synth.data.loading import values as module
from megatron_synth.data.loading.loader import Loader, validation_batches
from megatron_synth.data.loading.values import NOWHERE, values_of
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import native
from megatron_synth.data.shards.selection import select
from megatron_synth.data.shards.source import Source, open_source
from tests.support import with_columns, write_source

LENGTH = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    with_columns(folder / "web", 5, 6_000)
    write_source(folder / "bare", 6, 3_000)
    return folder


def kinds_of(source: Source) -> list[str | None]:
    """Of each token of a source the kind of its document; None where there is no such column."""
    base = getattr(source, "base", source)
    if not base.columns:
        return [None] * source.num_tokens
    column, by_shard = base.column("kind")
    found: list[str | None] = []
    for number, kinds in enumerate(by_shard):
        for kind, length in zip(kinds.tolist(), base.shard(number).document_lengths().tolist(), strict=True):
            found += ["(none)" if kind < 0 else column.categories[kind]] * length
    if base is source:
        return found
    return [
        found[at]
        for _, shard, begin, count in source.pieces(0, source.num_tokens)
        for at in range(base.first_token(shard) + begin, base.first_token(shard) + begin + count)
    ]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("most", [16, 2])
def test_every_label_has_the_value_of_its_document(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, most: int
) -> None:
    monkeypatch.setattr(module, "MAX_VALUES", most)
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    chosen = select(open_source(corpus / "web", "few"), parse("score >= 0.4 or kind == 'qa'"), tmp_path, "w")
    sources = [open_source(corpus / "web", "web"), chosen, open_source(corpus / "bare", "bare")]
    values = values_of(["kind"], sources, [])
    assert len(values.names) == (4 if most == 16 else 3) and ("kind/other" in values.names) == (most == 2)
    names = [name.removeprefix("kind/") for name in values.names]
    streams = [kinds_of(source) for source in sources]
    specs = [SourceSpec(one.name, Fraction(1, 3), one.num_windows(LENGTH), math.inf) for one in sources]
    plan = MixturePlan(specs, 3)
    loader = Loader(
        plan,
        sources,
        sequence_length=2 * LENGTH,
        micro_batch_size=3,
        data_parallel_rank=0,
        data_parallel_size=1,
        windows_per_sequence=2,
        values=[values.of(source) for source in sources],
    )
    seen = set()
    for step in range(40):
        for batch in loader.micro_batches(step * 12, 12):
            found = zip(*(part.tolist() for part in plan.places(batch.samples)), batch.values[0].tolist(), strict=True)
            for source_id, window, offset, numbers in found:
                begin = window * LENGTH + offset
                for kind, number in zip(streams[source_id][begin + 1 : begin + LENGTH + 1], numbers, strict=True):
                    assert number == NOWHERE if kind is None else names[number] in (kind, "other")
                    seen.add(number)
    assert seen == {*range(len(names)), NOWHERE}
    for batch in validation_batches(chosen, LENGTH, 4, 0, 1, values=values.of(chosen)):
        for window, numbers in zip(batch.samples.tolist(), batch.values[0].tolist(), strict=True):
            expected = streams[1][window * LENGTH + 1 : (window + 1) * LENGTH + 1]
            assert all(names[number] in (kind, "other") for kind, number in zip(expected, numbers, strict=True))


@pytest.mark.parametrize(
    ("column", "message"),
    [("kint", "no source has a column 'kint'; columns of categories are: kind"), ("score", "'score' is of type float32")],
)
def test_a_column_that_does_not_tell_values_apart_is_refused(corpus: Path, column: str, message: str) -> None:
    with pytest.raises(UserError, match=f"log.loss_by: .*{message}"):
        values_of([column], [open_source(corpus / "web", "web")], [open_source(corpus / "bare", "bare")])


def test_the_most_frequent_values_are_named_whatever_the_order_of_sources(corpus: Path) -> None:
    one, two = open_source(corpus / "web", "one"), open_source(corpus / "bare", "two")
    assert values_of(["kind"], [one, two], []).names == values_of(["kind"], [two], [one]).names
    column, by_shard = one.column("kind")
    counts = np.bincount(np.concatenate(by_shard) + 1)
    ordered = [["(none)", *column.categories][number] for number in np.argsort(-counts, kind="stable")]
    assert [name.removeprefix("kind/") for name in values_of(["kind"], [one], []).names] == ordered
