"""Streams and buffers in a wrong order are found, and in the right one they are not.

Run by `make gpu-rehearsal`, in its environment; each case is a process that has the device preloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nocuda.build import build, environment
from tests.nocuda.ordered import faults, stored_pointers
from tests.nocuda.rehearse import ROOT

# all cases in one process, each after a wait for the device
PROCESS = """
import json, os, sys, threading
from pathlib import Path
import torch, triton
import torch.distributed as dist
import triton.language as tl
from tests.nocuda.one_of_many import pretend
from tests.nocuda.ordered import ordered

@triton.jit
def add_one(from_ptr, to_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < n) + 1, mask=at < n)

def made():
    return torch.ones(64, 64, device="cuda")

pretend(1, 4, nccl=True)
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
told, found = Path(os.environ["NOCUDA_ORDER"]), {}
told.touch()
with ordered():
    here, other, third = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    for name, body in json.load(sys.stdin).items():
        x, pinned, event = made(), torch.ones(64, 64).pin_memory(), torch.cuda.Event()
        torch.cuda.synchronize()
        before = len(told.read_text().splitlines())
        exec(compile(body, f"{name}.py", "exec"))
        found[name] = told.read_text().splitlines()[before:]
        torch.cuda.synchronize()
        x = y = z = work = None
Path(sys.argv[1]).write_text(json.dumps(found))
os._exit(0)
"""
# what happens -> its code, and what must be told of it; None: nothing
ORDERS = {
    "an event between streams": (
        "x.add_(1); event.record(); other.wait_event(event)\nwith torch.cuda.stream(other): x.sum()",
        None,
    ),
    "a wait of the host between streams": ("x.add_(1); torch.cuda.synchronize()\nwith torch.cuda.stream(other): x.sum()", None),
    "a missing event": ("x.add_(1)\nwith torch.cuda.stream(other): x.sum()", "read before it is written: sum at "),
    "an event that is recorded too early": (
        "event.record(); x.add_(1); other.wait_event(event)\nwith torch.cuda.stream(other): x.sum()",
        "read before it is written: sum at ",
    ),
    "an event whose wait is on another stream": (
        "x.add_(1); event.record(); third.wait_event(event)\nwith torch.cuda.stream(other): x.sum()",
        "read before it is written",
    ),
    "two readers": ("x.sum()\nwith torch.cuda.stream(other): x.sum()", None),
    "a write over what another stream reads": (
        "x.sum()\nwith torch.cuda.stream(other): x.zero_()",
        "written before it is read: zero_ at ",
    ),
    "another part of the same tensor": ("x[:32].add_(1)\nwith torch.cuda.stream(other): x[32:].add_(1)", None),
    "a part that is also another's": (
        "x[:33].add_(1)\nwith torch.cuda.stream(other): x[32:].add_(1)",
        "written on two streams",
    ),
    "a buffer used again too early": (
        "y = made(); other.wait_stream(here)\nwith torch.cuda.stream(other): y.sum()\ndel y; z = made()",
        "written before it is read",
    ),
    "a buffer that its streams are recorded of": (
        "y = made(); other.wait_stream(here)\nwith torch.cuda.stream(other): y.sum(); y.record_stream(other)\ndel y; made()",
        None,
    ),
    "a pinned buffer written before its copy ended": (
        "x.copy_(pinned, non_blocking=True); pinned.fill_(2)",
        "pinned memory is written before a copy is known to have ended: the host at ",
    ),
    "a pinned buffer written by numpy": (
        "x.copy_(pinned, non_blocking=True); pinned.numpy()[5] = 2",
        "pinned memory is written before a copy is known to have ended",
    ),
    "a pinned buffer written by a thread": (
        "x.copy_(pinned, non_blocking=True); array = pinned.numpy()\n"
        "thread = threading.Thread(target=array.fill, args=(2,)); thread.start(); thread.join()",
        "pinned memory is written before a copy is known to have ended",
    ),
    "a pinned buffer read before it is there": (
        "pinned.copy_(x, non_blocking=True); pinned.sum()",
        "pinned memory is read too early: the host at ",
    ),
    "a pinned buffer read while it is copied": ("x.copy_(pinned, non_blocking=True); pinned.sum()", None),
    "a pinned buffer after its event": (
        "x.copy_(pinned, non_blocking=True); event.record(); event.synchronize(); pinned.fill_(2)",
        None,
    ),
    "a pinned buffer after the event of another stream": (
        "x.copy_(pinned, non_blocking=True); other.record_event(event); event.synchronize(); pinned.fill_(2)",
        "pinned memory is written",
    ),
    "a Triton kernel that reads": ("add_one[(4,)](x, made(), 4096, 1024)\nwith torch.cuda.stream(other): x.sum()", None),
    "a Triton kernel that writes": (
        "y = made(); other.wait_stream(here); add_one[(4,)](x, y, 4096, 1024)\nwith torch.cuda.stream(other): y.sum()",
        "read before it is written: sum at ",
    ),
    "a product": ("y = x @ x\nwith torch.cuda.stream(other): y.sum()", "read before it is written"),
    "a collective that is not waited for": (
        "work = dist.all_reduce(x, async_op=True); x.sum()",
        "read before it is written: sum at ",
    ),
    "a collective that is waited for": ("work = dist.all_reduce(x, async_op=True); work.wait(); x.sum()", None),
    "a collective's buffer written while it is read": (
        "y = made(); work = dist.all_gather_into_tensor(torch.empty(4, 64, 64, device='cuda'), y, async_op=True); y.zero_()",
        "written before it is read: zero_ at ",
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("order")
    script, result = folder / "process.py", folder / "found.json"
    script.write_text(PROCESS)  # Triton wants a file
    given = {**environment(build(ROOT / "build/nocuda")), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    given["NOCUDA_ORDER"] = str(folder / "order.txt")
    bodies = json.dumps({what: body for what, (body, _) in ORDERS.items()})
    done = subprocess.run([sys.executable, str(script), str(result)], env=given, input=bodies, capture_output=True, text=True)
    assert done.returncode == 0 and result.exists(), done.stderr
    return json.loads(result.read_text())


@pytest.mark.parametrize("what", ORDERS)
def test_a_wrong_order_is_found_and_a_right_one_is_not(what: str, found: dict[str, list[str]]) -> None:
    expected = ORDERS[what][1]
    if expected is None:
        assert found[what] == []
    else:
        assert len(found[what]) == 1 and expected in found[what][0] and f"{what}.py:" in found[what][0]


LAYOUT = (
    *("bench/tiny-7m.yaml", "precision.dtype=bf16", "parallel.tensor_model_parallel_size=2"),
    *("parallel.pipeline_model_parallel_size=2", "train.global_batch_size=64", "--world", "8", "--nccl", "--steps", "2"),
)
# megatron-core forgets to wait for the weights that data-parallel ranks gather while the forward pass runs
FORGETFUL = """
import sys
from pathlib import Path
from megatron.core.distributed import param_and_grad_buffer as buffers
from torch.distributed import distributed_c10d

class Forgetful:
    def __init__(self, work): self.work = work
    def wait(self): pass

start = buffers._ParamAndGradBucketGroup.start_param_sync
def forgetful(self, *given, **options):
    start(self, *given, **options)
    if self.param_gather_handle is not None:
        self.param_gather_handle = Forgetful(self.param_gather_handle)
buffers._ParamAndGradBucketGroup.start_param_sync = forgetful
from tests.nocuda import step
step.main()
"""


def steps(folder: Path, *how: str) -> list[str]:
    """What was in a wrong order in steps of a rank of TP2 x PP2 x DP2, with all that overlaps there."""
    told = folder / "order.txt"
    given = {**environment(build(ROOT / "build/nocuda")), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "NOCUDA_ORDER": str(told)}
    command = [sys.executable, *how, *LAYOUT, "--record", str(folder / "record.tsv")]
    done = subprocess.run(command, env=given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return faults(told)


@pytest.mark.parametrize("rank", ["0", "7"])
def test_steps_of_a_rank_overlap_in_order(rank: str, tmp_path: Path) -> None:
    assert steps(tmp_path, "-m", "tests.nocuda.step", "--rank", rank) == []


def test_weights_that_are_used_before_they_are_gathered_are_found(tmp_path: Path) -> None:
    found = steps(tmp_path, "-c", FORGETFUL, "--rank", "0")
    assert any("read before it is written" in one and "all-gather" in one for one in found), found


def test_a_kernel_is_known_by_what_it_stores_to() -> None:
    code = """
  tt.func public @add(%a: !tt.ptr<f32> loc("x"), %n: i32, %b: !tt.ptr<f32>) attributes {noinline = false} {
    %0 = tt.splat %a : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>
    %1 = tt.addptr %0, %2 : tensor<64x!tt.ptr<f32>>, tensor<64xi32>
    %3 = tt.load %1 : tensor<64x!tt.ptr<f32>>
    %4 = tt.splat %b : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>
    tt.store %4, %3 : tensor<64x!tt.ptr<f32>>
"""
    assert stored_pointers(code) == {2}
