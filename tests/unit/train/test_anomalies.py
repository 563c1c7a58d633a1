"""Loss spikes, steps that are not finite, and slow ranks: when they are noted, and what the note says."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_synth.config.schema import LogConfig
from megatron_synth.train.record.anomalies import Notes


class Events(list[str]):
    """Stands for a run directory."""

    path = Path("runs/a")
    event = list.append


def notes(ranks: int = 1, **settings: Any) -> tuple[Notes, Events]:
    events = Events()
    config: Any = SimpleNamespace(log=LogConfig(**settings))
    return Notes(config, events, [f"node{rank // 2}" for rank in range(ranks)]), events  # type: ignore[arg-type]


def step(made: Notes, number: int, loss: float, norm: float = 1.0) -> None:
    record = {"step": number, "train/loss": loss, "train/loss/web": loss, "train/loss/qa": 2 * loss, "optim/grad_norm": norm}
    what = made.look(record)
    if what is not None:
        made.tell(record, what, {"web": 5, "qa": 3, "idle": 0}, (8 * number - 8, 8 * number - 1))


def test_a_spike_is_noted_with_its_samples_and_sources() -> None:
    made, events = notes()
    for number in range(1, 101):
        step(made, number, 3 - 0.01 * number + 0.02 * math.sin(number))
    assert events == []
    step(made, 101, 4.0)
    (event,) = events
    assert event.startswith("warning: step 101: loss spike: 4.0000, ") and "samples 800 to 807: web 5 (loss 4), qa 3" in event
    assert event.endswith("megatron-synth mix show runs/a 800-807 --text") and "idle" not in event
    step(made, 102, 2.0)
    assert len(events) == 1


def test_a_spike_at_the_start_or_when_turned_off_is_none() -> None:
    made, events = notes()
    for number, loss in enumerate([11.0, 10.0, 9.0, 30.0, 9.0], start=1):
        step(made, number, loss)
    off, silent = notes(loss_spike_sigmas=None)
    for number in range(1, 40):
        step(off, number, 2.0 + 5 * (number == 30))
    assert events == silent == []


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf)])
def test_not_finite_is_always_noted_and_does_not_count(loss: float, norm: float) -> None:
    made, events = notes(loss_spike_sigmas=None)
    step(made, 7, loss, norm)
    assert len(events) == 1 and "step 7: not finite, skipped: loss" in events[0] and "48-55" in events[0]
    assert not made._losses


def test_a_slow_rank_is_named_when_it_is_slow_twice_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    made, events = notes(4, straggler_pct=20)
    made.times(10, [1.0, 1.0, 1.5, 1.1])
    assert events == []
    for number in (20, 30):
        made.times(number, [1.0, 1.0, 1.5, 1.3])
    assert len(events) == 1 and capsys.readouterr().out.count("warning:") == 2
    assert "step 20: rank 2 is slow: 1.500 s a step" in events[0] and "50 % over the median of 4 ranks, 1.000 s" in events[0]
    assert events[0].endswith("2 on node1, 3 on node1")
    made.times(40, [1.0, 1.0, 1.1, 1.1])
    made.times(50, [1.0, 2.0, 1.1, 1.1])  # another, once
    assert len(events) == 1


def test_no_rank_is_slow_alone_or_when_turned_off() -> None:
    alone, events = notes(1)
    off, silent = notes(2, straggler_pct=None)
    for number in range(3):
        alone.times(number, [5.0])
        off.times(number, [1.0, 5.0])
    assert events == silent == []
