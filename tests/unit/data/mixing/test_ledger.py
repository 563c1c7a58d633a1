"""The ledger: what was delivered equals the plan, or the run stops."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.dealing import deal
from megatron_synth.data.mixing.ledger import Ledger, LedgerMismatch
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.mixing.schedule import Phase

PLAN = MixturePlan(
    [
        SourceSpec("web", Fraction(1, 2), 40, 10),
        SourceSpec("qa", Fraction(1, 3), 7, 10),
        SourceSpec("code", Fraction(1, 6), 9, 10),
    ],
    seed=5,
)


def new_ledger() -> Ledger:
    return Ledger(PLAN.names, PLAN.ratios, PLAN.num_windows, 16)


def deliver(ledgers: list[Ledger], first: int, size: int) -> None:
    """One optimizer step: every rank counts its rows, the sum is merged everywhere."""
    total = np.zeros(3, dtype=np.int64)
    for rank in range(len(ledgers)):
        for row in deal(5, first, size, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=len(ledgers)):
            total += np.bincount(PLAN.locate(row)[0], minlength=3)
    for ledger in ledgers:
        ledger.merge(total)


@pytest.mark.parametrize("ranks", [1, 4])
def test_delivered_equals_planned_after_every_step(ranks: int) -> None:
    ledgers = [new_ledger() for _ in range(ranks)]
    for step in range(12):
        deliver(ledgers, step * 8, 8)
        for ledger in ledgers:
            ledger.verify(PLAN, (step + 1) * 8)
    assert ledgers[0].samples.tolist() == [48, 32, 16]


def test_one_wrong_sample_is_found_and_named() -> None:
    ledger = new_ledger()
    ledger.merge([47, 33, 16])
    with pytest.raises(LedgerMismatch, match=r"after 96 samples .*web: expected 48, found 47; qa: expected 32, found 33$"):
        ledger.verify(PLAN, 96)


def test_json_has_exact_counts() -> None:
    ledger = new_ledger()
    assert ledger.to_json()["sources"]["web"]["share"] == 0.0
    deliver([ledger], 0, 96)
    assert json.loads(json.dumps(ledger.to_json())) == {
        "samples": 96,
        "tokens": 1536,
        "sequence_length": 16,
        "sources": {
            "web": {"ratio": "1/2", "samples": 48, "tokens": 768, "epochs": 1.2, "share": 0.5},
            "qa": {"ratio": "1/3", "samples": 32, "tokens": 512, "epochs": 32 / 7, "share": 1 / 3},
            "code": {"ratio": "1/6", "samples": 16, "tokens": 256, "epochs": 16 / 9, "share": 1 / 6},
        },
    }


def test_a_resumed_ledger_goes_on() -> None:
    ledger = new_ledger()
    deliver([ledger], 0, 24)
    state = json.loads(json.dumps(ledger.state_dict()))
    resumed = new_ledger()
    resumed.load_state_dict(state)
    deliver([resumed], 24, 24)
    resumed.verify(PLAN, 48)
    assert ledger.samples.sum() == 24


def test_a_state_of_other_sources_is_refused() -> None:
    ledger = new_ledger()
    with pytest.raises(UserError, match=r"counts the sources books, web, the run has code, qa, web"):
        ledger.load_state_dict({"web": 1, "books": 2})


def test_a_source_that_joins_the_run_begins_at_nothing() -> None:
    ledger = new_ledger()
    ledger.load_state_dict({"web": 1, "qa": 2})
    assert ledger.samples.tolist() == [1, 2, 0]


def test_a_ledger_of_phases_has_the_exact_share_so_far() -> None:
    half, web = (Fraction(1, 2), Fraction(1, 2)), (Fraction(1), Fraction(0))
    specs = [SourceSpec("web", Fraction(0), 40, 10, unique_windows=8), SourceSpec("qa", Fraction(0), 7, 10)]
    plan = MixturePlan(specs, 5, [Phase(10, web), Phase(20, web, half, 5), Phase(None, half)])
    ledger = Ledger.of(plan, 16)
    assert ledger.to_json()["sources"]["web"]["ratio"] == "1"
    ledger.merge(plan.counts(13))
    content = ledger.to_json()["sources"]
    # blocks of 4 samples with ratios 19/20, 17/20, ...: 10 + 3 x 19/20 of 13
    assert (content["web"]["ratio"], content["qa"]["ratio"]) == (str(Fraction(257, 260)), str(Fraction(3, 260)))
    assert content["web"]["epochs"] == content["web"]["samples"] / 8  # passes over the windows in use
    assert Ledger.planned(plan, 16, 13).to_json() == ledger.to_json()
    assert Ledger.planned(PLAN, 16, 96).to_json()["sources"]["web"]["ratio"] == "1/2"
