"""Ten million samples in changing layouts with crashes in between: the ledger equals the plan, to the token."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from megatron_synth.data.loading.dealing import deal
from megatron_synth.data.mixing.ledger import Ledger
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.mixing.schedule import Phase

SAMPLES = 10_000_000
SEQUENCE_LENGTH = 4096


def mixture(web: str, rephrased: str, qa: str, textbook: str) -> tuple[Fraction, ...]:
    return Fraction(web), Fraction(rephrased), Fraction(qa), Fraction(textbook)


def new_plan() -> MixturePlan:
    specs = [
        SourceSpec("web", Fraction(0), 3_000_000, 2.0),
        SourceSpec("rephrased", Fraction(0), 1_000_000, 2.0, unique_windows=400_000),
        SourceSpec("qa", Fraction(0), 9_973, float("inf")),
        SourceSpec("textbook", Fraction(0), 700_001, float("inf")),
    ]
    natural, mixed, last = (
        mixture("1", "0", "0", "0"),
        mixture("0.67", "0.2", "0.1", "0.03"),
        mixture("1/3", "1/7", "11/42", "11/42"),
    )
    phases = [
        Phase(1_234_567, natural),
        Phase(3_000_001, natural, mixed, 1000),
        Phase(2_500_000, mixed),
        Phase(1_000_003, mixed, last, 64),
        Phase(None, last),
    ]
    return MixturePlan(specs, 11, phases)


def train(plan: MixturePlan, ledgers: list[Ledger], first: int, batch: int, steps: int, micro: int) -> int:
    """Some optimizer steps on all ranks; the samples consumed after them. Stops at the end of the run."""
    for _ in range(steps):
        size = min(batch, (SAMPLES - first) // (micro * len(ledgers)) * micro * len(ledgers))
        if size == 0:
            break
        slots = deal(plan.seed, first, size, micro_batch_size=size, data_parallel_rank=0, data_parallel_size=1)[0]
        sources = plan.occurrences(slots)[0].reshape(-1, len(ledgers), micro)  # slot to rank as `deal` states it
        counts = [np.bincount(sources[:, rank].reshape(-1), minlength=len(plan.names)) for rank in range(len(ledgers))]
        total = np.sum(counts, axis=0)
        for ledger in ledgers:
            ledger.merge(total)
        first += size
    return first


@pytest.mark.slow
def test_ten_million_samples_are_those_of_the_plan() -> None:
    rng = np.random.default_rng(0)
    saved: tuple[int, dict[str, int]] = (0, {"web": 0, "rephrased": 0, "qa": 0, "textbook": 0})
    starts, delivered, layouts = 0, 0, set()
    while saved[0] < SAMPLES:
        ranks, micro = int(rng.choice([1, 2, 3, 4, 7, 8])), int(rng.integers(1, 9))
        if SAMPLES - saved[0] < ranks * micro:
            ranks = micro = 1
        starts, layouts = starts + 1, layouts | {(ranks, micro)}
        plan = new_plan()  # a restart knows the number of samples and the ledger, nothing else
        ledgers = [Ledger.of(plan, SEQUENCE_LENGTH) for _ in range(ranks)]
        samples, state = saved
        for ledger in ledgers:
            ledger.load_state_dict(json.loads(json.dumps(state)))
        batch = ranks * micro * int(rng.integers(8192 // (ranks * micro), 65536 // (ranks * micro)))
        for _ in range(int(rng.integers(1, 4))):  # saves, then steps that a crash loses
            samples = train(plan, ledgers, samples, batch, int(rng.integers(1, 12)), micro)
            for ledger in ledgers:
                ledger.verify(plan, samples)
            saved = (samples, ledgers[0].state_dict())
        delivered += train(plan, ledgers, samples, batch, int(rng.integers(0, 3)), micro) - samples
    assert starts > 10 and len(layouts) > 8 and delivered > 0
    final = Ledger.of(new_plan(), SEQUENCE_LENGTH)
    final.load_state_dict(saved[1])
    assert final.to_json() == Ledger.planned(new_plan(), SEQUENCE_LENGTH, SAMPLES).to_json()
    assert final.to_json()["tokens"] == SAMPLES * SEQUENCE_LENGTH
