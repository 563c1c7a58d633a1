"""Before any test module: where there is no GPU, Triton's kernels are interpreted.

Triton decides when it is first imported, and other libraries import it too.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from megatron_synth.data.shards import native

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# what torch.compile has built for the processor as it is must not be taken for the one that tests are made to see
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_tests_{capability}"))

# how long an example takes says nothing on a busy machine
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of tests that wait for SLURM stand among those that compute, so that the processors always have work."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = [path for path in files if path.parent.name == "slurm"]
    others = [path for path in files if path.parent.name != "slurm"]
    every = max(1, len(others) * 2 // 3 // max(1, len(waiting)))
    order: list[Path] = []
    for number, path in enumerate(others):
        if number % every == 0 and waiting:
            order.append(waiting.pop(0))
        order.append(path)
    items[:] = [item for path in [*order, *waiting] for item in files[path]]


@pytest.fixture(params=["compiled", "numpy"], scope="module")
def compiled_and_not(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tests of a module run with the compiled functions of the data, and with numpy in their place."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "library", lambda: None)
        elif native.library() is None:
            pytest.skip("nothing was compiled: no C compiler when the package was installed")
        yield


@pytest.fixture
def unheard() -> Iterator[None]:
    """Signals reach handlers alone: `train`, called in this process before, listens to all of them for the rest of its life."""
    before = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(before, warn_on_full_buffer=False)
