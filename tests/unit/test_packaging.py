"""What is installed from a wheel is whole: the tutorial is followed with it, in an empty folder and far from the repository."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import megatron_synth
from tests.support import ROOT

TOP = ("megatron_synth", "kernels", "configs", "launch", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and the wheel that is built from it; without a network."""
    pytest.importorskip("build", reason="build is not installed; make setup-test brings it")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in TOP:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_distributions_hold_what_is_used_and_no_tests(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    expected = {"megatron_synth/configs/train/quickstart.yaml", "megatron_synth/launch/train.sbatch", "megatron_synth/py.typed"}
    assert expected <= names
    assert "megatron_synth_kernels/registry.py" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/", "kernels/", "configs/"))]
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("megatron_synth/data/shards/native.c") for name in archive.getnames())
    assert f"Version: {megatron_synth.__version__}\n" in metadata
    assert "Pre-trains GPT models" in metadata  # the README is its description
    assert sdist.name == f"megatron_synth-{megatron_synth.__version__}.tar.gz"


@pytest.mark.slow
def test_the_tutorial_is_followed_with_the_wheel_in_an_empty_folder(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(distributions[1])], check=True)
    write_text(folder / "text")
    # its last part only trains and evaluates again, with another mixture
    tutorial, _, rest = (ROOT / "docs" / "tutorial.md").read_text().partition("## 7. Compare two mixtures")
    assert rest
    files = re.findall(r"```yaml\n# file: (\S+)\n(.*?)```", tutorial, re.DOTALL)
    assert [name for name, _ in files] == ["data.yaml", "run.yaml"]
    for name, text in files:
        (folder / name).write_text(text)
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", tutorial, re.DOTALL))
    path = os.pathsep.join([str(site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": path, "OMP_NUM_THREADS": "1"}
    where = f"{sys.executable} -c 'import megatron_synth; print(megatron_synth.__file__)'"
    done = subprocess.run(
        ["bash", "-e", "-c", f"{where}\n{commands}"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(site / "megatron_synth"))
    assert "resumed at step 40" in done.stdout
    assert (folder / "runs" / "first" / "report.png").is_file()
    assert (folder / "exported" / "model.safetensors").is_file() and (folder / "exported" / "tokenizer.json").is_file()


def test_every_imported_distribution_is_declared() -> None:
    """What our packages import is the standard library, ours, or named in pyproject.toml; vendors' libraries are optional."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"]]
    for extra in ("gpu", "ray", "remote", "study", "synthesis", "tasks", "test", "trees"):
        requirements += extras[extra]
    declared = {re.split(r"[\s\[<>=;]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    distributions = {"yaml": "pyyaml", "megatron": "megatron_core", "transformer_engine_torch": "transformer_engine"}
    # measured beside ours, or taken where somebody built them; asked for before they are imported
    optional = {"apex", "fused_layer_norm_cuda", "amp_C", "liger_kernel"}
    ours = {"megatron_synth", "megatron_synth_kernels"}
    imported: dict[str, Path] = {}
    for folder in ("megatron_synth", "kernels/megatron_synth_kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in re.findall(
                r"^\s*(?:import|from) ([A-Za-z_]\w*)[\w.]*(?: import|$| as|,)", file.read_text(), re.MULTILINE
            ):
                imported.setdefault(name, file)
    unknown = {
        name: str(file.relative_to(ROOT))
        for name, file in imported.items()
        if name not in sys.stdlib_module_names | ours | optional and distributions.get(name, name) not in declared
    }
    assert unknown == {}
    assert {"torch", "tqdm", "pyarrow", "huggingface_hub"} <= imported.keys()


def write_text(folder: Path) -> None:
    """A megabyte of made-up text, a document a file."""
    folder.mkdir(parents=True)
    draw = random.Random(1)
    words = [f"w{number}" for number in range(2000)]
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(3000)))
