"""`python -m benchmarks coverage`: what coverage selection covers of the built-in corpus, beside as large random choices."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from megatron_synth.config.errors import EXIT_OK
from megatron_synth.synthesis.selection.coverage import (
    Neighbors,
    choose_at_random,
    hashed_ngrams,
    nearest,
    select,
)

SEEDS = range(5)
SHARES = (20, 10, 5, 2)  # one of so many documents is chosen


def covered(neighbors: Neighbors, chosen: Sequence[int], threshold: float) -> float:
    """Share of the documents that are chosen, or as similar to one that is."""
    seen = np.zeros(neighbors.documents, bool)
    seen[list(chosen)] = True
    for one in chosen:
        row = slice(int(neighbors.starts[one]), int(neighbors.starts[one + 1]))
        seen[neighbors.others[row][neighbors.similarities[row] >= threshold]] = True
    return float(seen.mean())


def rows(neighbors: Neighbors, wanted: float) -> list[list[str]]:
    """The table: for each size the threshold, what the selection covers, and what random choices do at this threshold."""
    table = [["chosen", "threshold", "covered by the selection", f"by {len(SEEDS)} random choices, mean (least to most)"]]
    for one_of in SHARES:
        k = neighbors.documents // one_of
        found = select(neighbors, k, wanted)
        assert found.threshold is not None
        others = [covered(neighbors, choose_at_random(neighbors.documents, k, seed), found.threshold) for seed in SEEDS]
        spread = f"{np.mean(others):.3f} ({min(others):.3f} to {max(others):.3f})"
        table.append([f"{k:,}", f"{found.threshold:.3f}", f"{found.covered:.3f}", spread])
    return table


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks coverage",
        description="Coverage of the built-in corpus by a selection, beside random choices of the same size.",
    )
    parser.add_argument("--coverage", type=float, default=0.9, help="share that a selection shall cover (%(default)s)")
    options = parser.parse_args(argv)
    from megatron_synth.bench import tables
    from megatron_synth.core.log import say
    from megatron_synth.data.preparing import builtin_corpus

    head = tables.header("", [])
    head["command"] = " ".join(["python -m benchmarks coverage", *argv])
    texts = [text for _, text in builtin_corpus.documents("natural")]
    start = time.process_time()
    vectors = hashed_ngrams(texts)
    between = time.process_time()
    neighbors = nearest(vectors)
    end = time.process_time()
    about = tables.header_lines(head)[:3]
    about.append(f"- {len(texts):,} documents; CPU time: vectors {between - start:.1f} s, neighbors {end - between:.1f} s")
    say("\n".join([*about, "", *tables.markdown_table(rows(neighbors, options.coverage))]))
    return EXIT_OK
