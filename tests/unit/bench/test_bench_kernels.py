"""The benchmark of kernels: every operation and backend, the same computation, and a table that follows from the times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.bench.kernels import measure
from megatron_synth.bench.kernels.cases import cases
from megatron_synth.bench.kernels.measure import Ceilings, Row
from megatron_synth.cli import bench
from megatron_synth.cli.bench import kernels as bench_kernels
from megatron_synth.config.errors import UserError
from megatron_synth.model.kernels import model_sizes
from megatron_synth_kernels.registry import OPERATIONS

# measured together, as the one loss that they make
TOGETHER = {"cross_entropy_stats": "cross_entropy", "cross_entropy_grad": "cross_entropy"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="baselines on a GPU are compiled, which takes minutes")
def test_every_operation_and_backend_is_measured_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    assert bench.main(["kernels", "--smoke", "--dtype", "fp32", "--vs", "eager,liger", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rows: list[dict[str, Any]] = found["rows"]
    for name, operation in OPERATIONS.items():
        measured = {row["contender"] for row in rows if row["operation"] == TOGETHER.get(name, name)}
        assert {backend.name for backend in operation.backends} - {"compile"} <= measured, name
    assert {row["operation"] for row in rows if row["contender"] == "eager"} == {row["operation"] for row in rows}
    for row in rows:
        assert (row["problem"] is None) == (row["seconds"] is not None), row
        if row["seconds"] is not None:
            assert row["ceiling"] == pytest.approx(row["rate"] / found["ceilings"]["product" if row["flops"] else "copy"])
    norms = {row["contender"]: row for row in rows if row["operation"] == "rms_norm" and row["direction"] == "forward"}
    assert norms["torch"]["rate"] * norms["torch"]["seconds"] == pytest.approx(2 * 16 * 96 * 4)
    assert norms["liger"]["problem"] is not None and norms["te"]["problem"] == "needs a CUDA device"
    printed = capsys.readouterr().out
    assert f"`{found['command']}`" in printed and "needs a CUDA device" in printed
    eager = [line for line in printed.splitlines() if line.startswith("| swiglu ") and " eager |" in line]
    assert len(eager) == 2 and all("x1.00" in line for line in eager)


def test_what_does_not_compute_the_same_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_synth.bench.kernels import cases as cases_module

    monkeypatch.setattr(cases_module, "eager_swiglu", lambda x: x.chunk(2, dim=-1)[0] * 1.01)
    with pytest.raises(UserError, match="swiglu smoke: eager does not compute what torch's does"):
        measure.run(
            bench_kernels.smoke_sizes(), torch.float32, torch.device("cpu"), measure.SMOKE, only="swiglu", baselines=["eager"]
        )


def test_bytes_and_flops_of_a_known_size() -> None:
    """RMSNorm reads and writes 2 x 8192 x 2048 bf16; causal attention is 4 S^2 A D / 2 FLOPs, 2.5 times that backward."""
    (sizes, _) = model_sizes(bench_kernels.MODELS, 8192)
    assert (sizes.hidden, sizes.ffn, sizes.heads, sizes.head_dim) == (2048, 5632, 16, 128)
    with torch.device("meta"):
        found = {case.operation: case for case in cases(sizes, torch.bfloat16, torch.device("meta"))}
    assert found["rms_norm"].forward == 2 * 8192 * 2048 * 2
    assert found["swiglu"].backward == 5 * 8192 * 5632 * 2
    assert found["attention"].forward == 2 * 8192**2 * 2048 and found["attention"].backward == 5 * 8192**2 * 2048
    assert found["cross_entropy"].forward == 3 * 8192 * 50_304 * 2
    assert found["adam"].forward == 28 * 2048 * 5632
    assert found["wgrad"].forward == 2 * 8192 * 2048 * 5632


def test_the_table_follows_from_the_times() -> None:
    rows = [
        Row("rope", "m", "forward", "torch", 2e-6, 5e11, False, 0.5, 1 << 30),
        Row("rope", "m", "forward", "eager", 8e-6, 1.25e11, False, 0.125, None),
        Row("rope", "m", "forward", "te", problem="needs a CUDA device"),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in bench_kernels.table(rows)[2:]]
    assert lines[0] == ["rope", "m", "forward", "torch", "2.0", "500.0 GB/s", "50.0%", "1.00", "x4.00", ""]
    assert lines[1][7:] == ["n/a", "x1.00", ""] and lines[2][3:] == ["te", "", "", "", "", "", "needs a CUDA device"]
    assert "copy 4,000 GB/s" in "\n".join(bench_kernels.conventions(bench_kernels.smoke_sizes(), "bf16", Ceilings(4e12, 8e14)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vs", "eager,ligr"], "unknown baseline 'ligr'; any of eager, compile"),
        (["--json", "no/such/folder/x.json"], "no/such/folder is not a folder"),
        (["--smoke", "--only", "conv"], "--only conv: no operation has this in its name; known: rms_norm"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.main(["kernels", *arguments])


def test_tokens_are_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["kernels", "--tokens", "0"])
    assert "--tokens: expected a whole number of 1 or more, found '0'" in capsys.readouterr().err
