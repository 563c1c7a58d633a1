"""What follows the end of a job's step: the table of cases, and that no history goes on for ever."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_synth.cli import main as cli
from megatron_synth.cluster.verdict import End, Report, classify, decide, main, read_attempts, read_reports
from megatron_synth.config.errors import UserError
from megatron_synth.core import exit_record
from tests.support import run_info

BAD = Report(10.0, 3, "node2", 1, 7, "ValueError", "bad sample at 0x7f3a", "loop.py:12 run")
CUT_OFF = Report(9.0, 0, "node1", 1, 7, "RuntimeError", "Connection closed by peer [10.0.0.1]:4711", "step.py:3 step")
REFUSED = Report(8.0, 0, "node1", 2, None, "UserError", "web: too small", "cli.py:1 main")
SAVED = Report(11.0, 0, "node1", 75, 7, None, "", None)
DONE = Report(11.0, 0, "node1", 0, 7, None, "", None)


@pytest.mark.parametrize(
    ("reports", "code", "stopping", "kind", "explained"),
    [
        ([DONE], 0, False, "done", True),
        ([DONE], 1, True, "done", True),  # the stop came during the last step
        ([SAVED], 1, False, "stopped", True),  # the signal went to the ranks alone
        ([SAVED, BAD], 1, True, "failed", True),
        ([CUT_OFF, BAD], 1, False, "failed", True),
        ([CUT_OFF], 137, False, "failed", False),
        ([REFUSED], 1, False, "refused", True),
        ([], 0, False, "done", True),
        ([], 75, False, "stopped", True),
        ([], 1, True, "stopped", True),  # before the ranks listened
        ([], 2, False, "refused", True),
        ([], 137, False, "failed", False),
    ],
)
def test_what_happened(reports: list[Report], code: int, stopping: bool, kind: str, explained: bool) -> None:
    end = classify(reports, code, stopping=stopping, began=3, step=7)
    assert (end.kind, end.explained, end.began, end.step) == (kind, explained, 3, 7)


def test_the_first_rank_with_a_reason_of_its_own_is_named() -> None:
    end = classify([CUT_OFF, BAD], 1, stopping=False, began=0, step=0)
    assert end.why == "rank 3 on node2: ValueError: bad sample at 0x7f3a (loop.py:12 run)" and end.step == 7


def failed(step: int, message: str = "bad sample at 0x7f3a") -> End:
    return classify([replace(BAD, step=step, message=message)], 1, stopping=False, began=0, step=0)


def test_the_same_error_at_the_same_step_stops_the_second_time() -> None:
    first = failed(7, "bad sample at 0x1")
    assert decide(first, [], 20).requeue
    again = decide(failed(7, "bad sample at 0x2"), [first], 20)
    assert not again.requeue and again.code == 1 and "failed twice at step 7 with the same error" in again.why
    assert decide(failed(8), [first], 20).requeue and decide(failed(7, "another"), [first], 20).requeue
    stopped = classify([SAVED], 1, stopping=True, began=0, step=9)
    assert decide(failed(7), [first, stopped], 20).requeue  # it got past it in between


def test_a_lost_node_is_given_three_times() -> None:
    lost = classify([], 137, stopping=False, began=0, step=5)
    assert decide(lost, [lost], 20).requeue and not decide(lost, [lost, lost], 20).requeue


def test_refused_runs_are_not_tried_again() -> None:
    decision = decide(classify([REFUSED], 1, stopping=True, began=0, step=0), [], 20)
    assert (decision.requeue, decision.code) == (False, 2) and "web: too small" in decision.why


def test_stops_without_progress_end() -> None:
    idle, busy = (classify([SAVED], 1, stopping=True, began=5, step=step) for step in (5, 6))
    assert decide(busy, [busy] * 50, 0).requeue  # a long run may stop as often as it likes
    assert decide(idle, [idle, busy], 20).requeue and decide(idle, [idle], 20).requeue
    last = decide(idle, [busy, idle, idle], 20)
    assert not last.requeue and last.code == 75 and "--time" in last.why


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=40, max_size=40), st.integers(0, 10))
def test_no_history_without_progress_goes_on_for_ever(events: list[tuple[int, bool, bool]], budget: int) -> None:
    earlier: list[End] = []
    for step, fails, explained in events:
        reports = ([BAD] if explained else []) if fails else [SAVED]
        end = replace(classify(reports, 137, stopping=not fails, began=step, step=step), step=step)
        if not decide(end, earlier, budget).requeue:
            break
        earlier.append(end)
    failures = sum(end.kind == "failed" for end in earlier)
    assert failures <= budget and len(earlier) <= budget + 2 * (budget + 1)


def test_the_verdict_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, job = tmp_path / "run", tmp_path / "run" / "slurm" / "a"
    job.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(run_info()))
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (job / "job.json").write_text(json.dumps({"run_dir": str(run)}))

    def end(restart: int) -> str:
        where = ["--job", "17", "--restart", str(restart), "--job-dir", str(job), "--max-restarts", "5"]
        assert main(["begin", "--nodes", "node[1-2]", *where]) == 0
        folder = job / "outcomes" / f"17.{restart}"
        folder.mkdir(parents=True)
        (folder / "node-1.jsonl").write_text(json.dumps({**vars(BAD), "step": 2}) + "\n{cut off")
        assert len(read_reports(folder)) == 1
        assert main(["end", "--code", "1", *where]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert [end(0), end(1)] == ["requeue", "exit 1"]
    events = (run / "events.log").read_text().splitlines()
    assert "job 17: requeued: failed at step 2, restart 1 of 5; rank 3 on node2: ValueError" in events[0]
    assert "job 17: stopped for good: failed twice at step 2 with the same error" in events[1]
    lines = read_attempts(job, "17")
    assert [line["event"] for line in lines] == ["begin", "end"] * 2 and lines[0]["nodes"] == "node[1-2]"


@pytest.mark.parametrize(("rank", "code", "lines"), [("0", 0, 1), ("1", 0, 0), ("1", 75, 1)])
def test_ranks_report_how_they_end(rank: str, code: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(exit_record.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("GROUP_RANK", "4")
    monkeypatch.setattr(cli, "load", lambda name: lambda arguments: code)
    assert cli.main(["train"]) == code
    assert [report.code for report in read_reports(tmp_path)] == [code] * lines


def test_errors_are_reported_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(arguments: list[str]) -> int:
        raise UserError("no such file") if arguments else KeyError("step")

    monkeypatch.setenv(exit_record.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setattr(cli, "load", lambda name: verb)
    assert cli.main(["train", "x"]) == 2
    with pytest.raises(KeyError):
        cli.main(["train"])
    first, second = read_reports(tmp_path)
    assert (first.code, first.error, first.message, first.rank) == (2, "UserError", "no such file", 5)
    assert (second.code, second.error) == (1, "KeyError") and second.where is not None and "verb" in second.where
    monkeypatch.setenv(exit_record.FOLDER_VARIABLE, str(tmp_path / "absent"))
    assert cli.main(["train", "x"]) == 2  # a folder that cannot be written does not hide the error
