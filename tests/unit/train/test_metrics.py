"""metrics.jsonl across crashes and resumes, and the console lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.train.record.metrics import (
    MetricsFile,
    RunningWindow,
    decode,
    encode,
    format_eval,
    format_step,
    has_eval,
    parts,
    read_metrics,
)


def records(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": 10 / step, "optim/lr": 1e-4 / 3} for step in range(first, last + 1)]


def strict(line: str) -> Any:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    written = [{"step": 1, "a": 0.1 + 0.2, "b": 5e-324, "c": -0.0, "d": None, "e": 2**60, "f": "quelle/é"}]
    MetricsFile(tmp_path / "m").append(written)
    (read,) = read_metrics(tmp_path / "m")
    assert read == written[0] and math.copysign(1, read["c"]) == -1


def test_non_finite_numbers_are_valid_json_and_not_lost() -> None:
    record = {"step": 3, "x": math.nan, "y": math.inf, "z": -math.inf, "ok": 1.5, "unknown": None}
    line = encode(record)
    assert strict(line) == {
        "step": 3,
        "x": None,
        "y": None,
        "z": None,
        "ok": 1.5,
        "unknown": None,
        "non_finite": {"x": "nan", "y": "inf", "z": "-inf"},
    }
    back = decode(line)
    assert math.isnan(back.pop("x")) and back == {name: value for name, value in record.items() if name != "x"}


def test_resume_drops_later_steps_then_goes_on(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    file.append(records(1, 12))
    assert len(file.truncate_after(10)) == 10
    file.append(records(11, 15))
    assert read_metrics(tmp_path / "m") == records(1, 15)
    assert len(MetricsFile(tmp_path / "m").truncate_after(15)) == 15
    assert MetricsFile(tmp_path / "absent").truncate_after(5) == [] and not (tmp_path / "absent").exists()


def test_every_possible_torn_end_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "m"
    MetricsFile(path).append(records(1, 4))
    whole = path.read_bytes()
    third_ends = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(third_ends, len(whole)):
        path.write_bytes(whole[:cut])
        complete = cut >= len(whole) - 1  # all but the line break is there
        assert read_metrics(path) == records(1, 4 if complete else 3)
        file = MetricsFile(path)
        file.truncate_after(4)
        file.append(records(5, 5))
        assert read_metrics(path) == [*records(1, 4 if complete else 3), *records(5, 5)]
        assert all(strict(line) for line in path.read_text().splitlines())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_blocks_that_never_reached_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "m"
    MetricsFile(path).append(records(1, 2))
    with open(path, "ab") as file:
        file.write(b"\0" * 100)
    MetricsFile(path).truncate_after(2)
    assert read_metrics(path) == records(1, 2) and b"\0" not in path.read_bytes()


def test_append_after_a_torn_line_without_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "a')
    MetricsFile(path).append(records(2, 3))
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"stp": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m: line 2 of 3 is not a step record"):
        read_metrics(tmp_path / "m")


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "m") == []
    MetricsFile(tmp_path / "m").append([])
    assert not (tmp_path / "m").exists()


FULL = {
    "step": 120,
    "train/loss": 3.21042,
    "train/loss/web": 3.1,
    "optim/grad_norm": 0.8149,
    "optim/lr": 3e-4,
    "perf/tokens_per_sec_per_gpu": 41_234.0,
    "perf/tflops_per_gpu": 512.3,
    "perf/mfu": 0.51801,
    "perf/step_s": 1.2718,
    "perf/data_pct": 0.42,
    "mem/peak_gib": 62.1,
    "data/tokens": 125_829_120,
    "optim/skipped": 0,
}


def test_the_line_of_a_gpu() -> None:
    assert format_step(FULL, 1000, eta_s=1117.2, memory_total_gib=79.1) == (
        "step 120/1000 | loss 3.2104 | gnorm 0.81 | lr 3.00e-04 | 41.2k tok/s/gpu | 512 TFLOP/s/gpu | mfu 51.8% "
        "| mem 62.1/79.1 GiB | data 0.4% | step 1.27s | tokens 1.26e+08 | eta 0:18:37 | skipped 0"
    )


def test_the_line_of_a_cpu_with_a_skipped_step() -> None:
    record = FULL | {"train/loss": math.nan, "perf/mfu": None, "perf/tflops_per_gpu": 0.00412, "mem/peak_gib": 0.92}
    assert format_step(record | {"perf/tokens_per_sec_per_gpu": 871.6, "optim/skipped": 2}, 1000) == (
        "step 120/1000 | loss nan | gnorm 0.81 | lr 3.00e-04 | 872 tok/s/rank | 0.00412 TFLOP/s/rank | mfu n/a "
        "| mem 0.92 GiB | data 0.4% | step 1.27s | tokens 1.26e+08 | eta n/a | skipped 2"
    )


def test_parts_that_a_record_lacks_are_left_out() -> None:
    assert format_step({"step": 1, "train/loss": 2.0}, 2, eta_s=0.4) == "step 1/2 | loss 2.0000 | eta 0:00:00"


def test_the_line_of_an_evaluation() -> None:
    domains = {"eval/loss/web": 3.051, "eval/loss/code": 1.88, "eval/loss/synth/qa": 2.41}
    record = {"step": 120, **domains, "eval/bpb/web": 1.0, "eval/loss": 2.74, "eval/bpb": 0.929}
    assert format_eval(record) == "eval step 120 | web 3.05 | code 1.88 | synth/qa 2.41 | mean 2.74 | bpb 0.93"
    assert format_eval({"step": 7, **domains}) == "eval step 7 | web 3.05 | code 1.88 | synth/qa 2.41"
    assert has_eval(record) and not has_eval(FULL)
    assert parts(record, "eval/loss/") == {"web": 3.051, "code": 1.88, "synth/qa": 2.41}


def test_the_first_steps_do_not_count_in_the_time_left() -> None:
    window = RunningWindow(skip=2, size=3)
    for seconds in (60.0, 30.0):
        window.add(seconds)
        assert window.mean is None and window.eta_s(10) is None
    for seconds, mean in ((1.0, 1.0), (2.0, 1.5), (3.0, 2.0), (7.0, 4.0)):
        window.add(seconds)
        assert window.mean == mean
    assert window.eta_s(10) == 40.0 and window.eta_s(0) == 0.0


@pytest.mark.parametrize("lines", [1, 3, 40])
def test_the_last_record_can_grow(lines: int, tmp_path: Path) -> None:
    """Also where the last line is longer than what is read at once from the end."""
    file = MetricsFile(tmp_path / "m")
    records = [{"step": step, "train/loss": 1.0 / step, "text": "x" * 3000} for step in range(1, lines + 1)]
    file.append(records)
    records[-1]["eval/loss"] = 2.0
    file.replace_last(records[-1])
    file.append([{"step": lines + 1}])
    assert read_metrics(tmp_path / "m") == [*records, {"step": lines + 1}]


def test_a_record_that_cannot_grow_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "m")
    file.append([{"step": 1}, {"step": 2, "train/loss": 1.0}])
    before = (tmp_path / "m").read_bytes()
    overwrite = MetricsFile._overwrite
    failed: list[bytes] = []

    def full(target: Any, begin: int, content: bytes) -> None:
        if not failed:
            failed.append(content)
            target.seek(begin)
            target.write(content[: len(content) // 2])
            raise OSError("no space left")
        overwrite(target, begin, content)

    monkeypatch.setattr(MetricsFile, "_overwrite", staticmethod(full))
    with pytest.raises(OSError, match="no space left"):
        file.replace_last({"step": 2, "train/loss": 1.0, "eval/loss": 2.0})
    assert failed and (tmp_path / "m").read_bytes() == before
