"""Profile, sweep, report and the GPU script: each says what happened, whatever happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_synth.bench import gpu
from megatron_synth.bench.train import sweep
from megatron_synth.bench.train.profile import NAMES, category, shares
from megatron_synth.cli import bench
from megatron_synth.cli.bench import gpu as bench_gpu
from megatron_synth.cli.bench import report as bench_report
from megatron_synth.config.errors import UserError
from tests.faults.bench_gpu import campaign

TINY = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.vocab_size=250"]
TINY += ["train.sequence_length=16", "train.global_batch_size=4", "train.micro_batch_size=2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "data"),
        ("aten::mm", "gemm"),
        ("aten::mul", "other"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "other"),
    ],
)
def test_kernels_are_told_apart(name: str, expected: str) -> None:
    assert category(name) == expected


def test_shares_add_up_and_what_runs_beside_counts_once() -> None:
    found = shares([("gemm", 0, 4), ("communication", 2, 6), ("other", 8, 9), ("attention", -5, -1)], 0, 10)
    assert found == pytest.approx({**dict.fromkeys(NAMES, 0), "gemm": 0.4, "communication": 0.2, "other": 0.1, "gaps": 0.3})
    generator = np.random.default_rng(0)
    for _ in range(50):
        starts = generator.uniform(0, 10, 30)
        intervals = [(NAMES[int(generator.integers(6))], at, at + generator.exponential()) for at in starts]
        found = shares(intervals, 1, 9)
        assert sum(found.values()) == pytest.approx(1) and min(found.values()) >= 0


def record(step_s: list[float], model: str = "m", tokens: float = 100.0) -> dict[str, Any]:
    row = {"name": "megatron-synth", "step_s": [step_s], "tokens_per_s_per_rank": tokens, "tflops_per_rank": 1.0}
    train = {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 2}
    return {
        "device": "cpu",
        "git": None,
        "layout": "TP1",
        "config": {"train": train, "model": {"name": model}, "precision": {"dtype": "fp32"}},
        "rows": [{**row, "mfu": None, "peak_bytes": 2**30}],
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_slowdown_beyond_noise_fails_and_noise_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(1)
    normal = lambda middle, spread: generator.normal(middle, spread, 40).tolist()  # noqa: E731
    before = write(tmp_path / "before.json", record(normal(1.0, 0.02)))
    cases = {
        "slower": (normal(1.08, 0.02), 1),
        "the same": (normal(1.0, 0.02), 0),
        "slower, but within the tolerance": (normal(1.02, 0.001), 0),
        "faster": (normal(0.9, 0.02), 0),
        "slower once, in noise": ([1.0, 1.5, 1.06], 0),
    }
    for name, (steps, code) in cases.items():
        after = write(tmp_path / "after.json", record(steps))
        assert bench_report.main([str(after), "--baseline", str(before)]) == code, name
    assert "SLOWER" in capsys.readouterr().out
    other = write(tmp_path / "other.json", record([1.0], model="n"))
    with pytest.raises(UserError, match="no point of it has the model, settings and device"):
        bench_report.main([str(other), "--baseline", str(before)])


def test_tables_as_markdown_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = {"points": [{"result": record([1.0, 2.0, 3.0])}, {"result": None}]}
    parts = {"parts": {"a": {"result": record([0.5], "n")}, "b": {"status": "failed", "result": None}}}
    files = [str(write(tmp_path / "sweep.json", points)), str(write(tmp_path / "gpu.json", parts))]
    csv, png = tmp_path / "t.csv", tmp_path / "t.png"
    assert bench_report.main([*files, "--csv", str(csv), "--png", str(png)]) == 0
    assert "2000.0 | 1000.0 to 3000.0 |" in capsys.readouterr().out
    assert [line.split(",")[0] for line in csv.read_text().splitlines()] == ["model", "m", "n"]
    assert png.read_bytes().startswith(b"\x89PNG")
    for content, message in (({"x": 1}, "holds no measurement"), ([1], "expected what `bench train --json` writes")):
        with pytest.raises(UserError, match=message):
            bench_report.main([str(write(tmp_path / "bad.json", content))])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"levers": 1}', '{"levers": [], "config": []}', "\xff", '{"points": [[1]]}'])
def test_a_file_that_was_not_measured_is_one_message(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"bad\.json"):
        bench_report.main([str(file)])


def test_points_are_pruned_by_rules_and_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {"parallel.tensor_model_parallel_size": ["1", "2", "3"], "train.micro_batch_size": ["1", "4"]}
    legal, refused = sweep.points("bench/tiny-7m.yaml", [], 2, axes, "cpu")
    assert [point.settings[0][-1] + point.settings[1][-1] for point in legal] == ["11", "14", "21", "24"]
    assert len(refused) == 2 and all("ranks" in outcome.status for outcome in refused)
    tried = []

    def pretend(path: str, settings: Any, point: sweep.Point, options: Any, timeout_s: float) -> sweep.Outcome:
        tried.append(point)
        return sweep.Outcome(point, "failed", error="broken")

    monkeypatch.setattr(sweep, "measure", pretend)
    outcomes = sweep.sweep("bench/tiny-7m.yaml", [], legal, capacity=legal[2].predicted_bytes)
    assert tried == [point for point in legal if point.predicted_bytes <= legal[2].predicted_bytes] != legal
    assert sum("not tried: estimated" in outcome.status for outcome in outcomes) == len(legal) - len(tried)
    with pytest.raises(UserError, match="no point of the sweep could be measured: failed broken"):
        sweep.best(outcomes)


@pytest.mark.slow
def test_a_sweep_survives_what_runs_out_of_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point = sweep.Point(("model.ffn_hidden_size=4194304", "model.hidden_size=65536"), 1, 0)  # 3 TB for one matrix
    outcome = sweep.measure("bench/tiny-7m.yaml", TINY, point, (), 240)
    assert outcome.status == "out of memory", outcome
    argv = ["train", *TINY, "--vary", "model.hidden_size=32,1048576", "--pairs", "1", "--steps", "2", "--warmup", "1"]
    assert bench.main([*argv, "--json", str(tmp_path / "sweep.json"), "--profile"]) == 0
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["best"] == ["model.hidden_size=32"]
    fine, pruned = content["points"]
    assert sum(fine["result"]["shares"].values()) == pytest.approx(1)
    assert "not tried: estimated" in pruned["status"] and pruned["result"] is None
    assert "best: model.hidden_size=32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--sweep", "--vs", "hf"], "--vs: baselines run beside one configuration"),
        (["train", "--vary", "train.recompute"], "--vary: expected KEY=V1,V2"),
        (["train", "--model", "tiny-9m"], "no configuration file model/tiny-9m.yaml"),
        (["train", "--data", "real", "--vs", "hf"], "the baselines have no loader"),
        (["train", "--trace", "no/such/x.json"], "no/such is not a folder"),
        (["gpu", "--smoke", "--only", "nothing"], "no such part; there are: numerics of kernels"),
        (["memory", "--json", "no/such/x.json"], "no/such is not a folder"),
        (["report", "no-such.json"], "no-such.json: cannot be read"),
    ],
)
def test_mistakes_are_told_at_once(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.main(argv)


def test_the_gpu_script_keeps_to_ten_minutes_and_tells_most_first() -> None:
    assert sum(part.budget_s for part in gpu.parts(smoke=False)) <= 570
    names = [part.name for part in gpu.parts(smoke=False)]
    assert names[:3] == ["numerics of kernels", "llama-1.3b bf16", "llama-1.3b fp8 own"]
    assert {"llama-3b bf16", "llama-1.3b bf16, real loader", "kernels", "numerics of runs"} <= set(names)
    for argument in gpu.parts(smoke=False)[0].command:  # tests that it names are there
        file, _, test = argument.partition("::")
        assert not test or f"def {test}(" in Path(file).read_text()


@pytest.mark.parametrize(
    ("gigabytes", "micro_batches"),
    [(141, {"llama-1.3b bf16": 2, "llama-3b bf16": 2}), (80, {"llama-1.3b bf16": 2, "llama-3b bf16": 1}), (30, {})],
)
def test_micro_batches_fit_the_gpu(gigabytes: int, micro_batches: dict[str, int]) -> None:
    found = {part.name: part for part in gpu.parts(smoke=False, memory=int(gigabytes * 1.065e9))}
    for name, size in micro_batches.items():
        assert not found[name].skipped and f"train.micro_batch_size={size}" in found[name].command
    if gigabytes == 30:
        assert "GB, the GPU has 32" in found["llama-3b bf16"].skipped
    # two engines at a time
    levers = found["llama-1.3b bf16, levers"]
    assert bool(levers.skipped) is (gigabytes == 30)


def test_the_gpu_script_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, file = tmp_path / "mark", tmp_path / "gpu.json"
    counts = ("-c", f"open({str(mark)!r}, 'a').write('x')")
    fails = ("-c", "raise SystemExit('torch.OutOfMemoryError: CUDA out of memory')")
    monkeypatch.setattr(
        bench_gpu, "parts", lambda smoke, memory: [gpu.Part("counts", counts, 60), gpu.Part("fails", fails, 60)]
    )
    assert bench_gpu.main(["--smoke", "--json", str(file)]) == 1
    assert "micro_batch_size=1" in json.loads(file.read_text())["parts"]["fails"]["advice"]
    assert bench_gpu.main(["--smoke", "--json", str(file)]) == 1
    assert mark.read_text() == "x", "what was done is done"
    # another command is another part, and all of it is run where that is asked for
    monkeypatch.setattr(bench_gpu, "parts", lambda smoke, memory: [gpu.Part("counts", (*counts, "more"), 60)])
    assert bench_gpu.main(["--smoke", "--json", str(file)]) == 1
    assert mark.read_text() == "xx"
    assert bench_gpu.main(["--smoke", "--again", "--json", str(file)]) == 0
    assert mark.read_text() == "xxx" and list(json.loads(file.read_text())["parts"]) == ["counts"]
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "device": "another"}))
    with pytest.raises(UserError, match=r"gpu.json is of another device"):
        bench_gpu.main(["--smoke", "--json", str(file)])
    file.write_text("[]")
    with pytest.raises(UserError, match="expected what `bench gpu` wrote"):
        bench_gpu.main(["--smoke", "--json", str(file)])


THREE_PARTS = """
import sys
from pathlib import Path
from megatron_synth.bench import gpu

block = "import json, subprocess, sys, time; from pathlib import Path; child = subprocess.Popen(['sleep', '600']);"
block += "[(Path(sys.argv[1]).write_text(json.dumps({'blocks': n})), time.sleep(0.1)) for n in range(8)]; child.kill()"
gpu.measure([gpu.Part(name, ("-c", block, "{json}"), 60) for name in "abc"], True, Path(sys.argv[1]), [])
"""


def test_the_gpu_script_is_killed_and_keeps_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-c", THREE_PARTS, str(file)]
    assert campaign(command, file, kills=3, seed=1, longest_s=1.0) == 3
    parts = json.loads(file.read_text())["parts"]
    assert {name: part["result"]["blocks"] for name, part in parts.items()} == dict.fromkeys("abc", 7)


def test_a_part_that_was_killed_is_known_by_what_it_had_measured(tmp_path: Path) -> None:
    folder = tmp_path / "gpu.json.running"
    folder.mkdir()
    (folder / "running.json").write_text(json.dumps({"part": "a", "command": ["-c", "x"], "mark": "none such"}))
    (folder / "part.json").write_text('{"rows": 1}')
    assert gpu._interrupted(folder) == {
        "a": {"command": ["-c", "x"], "status": "cut off", "took_s": 0.0, "result": {"rows": 1}}
    }
    assert gpu._interrupted(folder) == {}
    (folder / "running.json").write_text("[]")
    assert gpu._interrupted(folder) == {}


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "megatron_synth", "bench", "gpu", "--smoke", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["status"] for part in parts.values()} <= {"done", "skipped"}
    assert parts["tiny-1m bf16, real loader"]["result"]["data"] == "real"
    assert bench_report.main([str(tmp_path / "gpu.json")]) == 0

    # a part that hangs and one that crashes are reported as such, and the file has both
    made = [
        gpu.Part("hangs", ("-c", "import time; time.sleep(60)"), 0.1),
        gpu.Part("crashes", ("-c", "raise SystemExit('broken')"), 600),
    ]
    monkeypatch.setattr(bench_gpu, "parts", lambda smoke, memory: made)
    assert bench_gpu.main(["--smoke", "--json", str(tmp_path / "bad.json")]) == 1
    bad = json.loads((tmp_path / "bad.json").read_text())["parts"]
    assert [part["status"] for part in bad.values()] == ["over its budget", "failed"]
    assert "broken" in bad["crashes"]["printed"]
