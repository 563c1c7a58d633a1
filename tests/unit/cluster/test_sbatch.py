"""Batch scripts, cluster settings, and what `submit` refuses before SLURM hears of it. A real SLURM is in tests/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.cli import main as cli
from megatron_synth.cluster import sbatch, slurm, snapshot
from megatron_synth.cluster.sbatch import JobSpec, changed, directive, load_cluster, render, render_array
from megatron_synth.config.cluster import ClusterConfig, ContainerConfig, time_limit_s
from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import shipped
from tests.support import ROOT, write_config, write_corpus
from tests.support import snapshot as contents


def spec(tmp_path: Path, **settings: object) -> JobSpec:
    cluster = ClusterConfig.model_validate(settings)
    arguments = ("a b.yaml", "x=[1, 2]", "--run-dir", "/runs/it's")
    return JobSpec("name", tmp_path / "job", tmp_path, arguments, nodes=4, ranks_per_node=8, gpus_per_node=8, cluster=cluster)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_a_script_asks_for_what_was_asked(tmp_path: Path) -> None:
    settings = {"partition": "gpu", "account": "me", "qos": "high", "time": "1-00:00:00", "mem": "0", "cpus_per_rank": 4}
    script = render(spec(tmp_path, **settings, gpu_type="h100", exclusive=True, stop_lead_s=120, sbatch="--constraint=ib"))
    found = directives(script)
    for option in ("--nodes=4", "--gpus-per-node=h100:8", "--cpus-per-task=32", "--ntasks-per-node=1", "--partition=gpu"):
        assert option in found
    for option in ("--account=me", "--qos=high", "--time=1-00:00:00", "--mem=0", "--exclusive", "--constraint=ib"):
        assert option in found
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(found)
    first_command = next(number for number, line in enumerate(script.splitlines()) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in script.splitlines()[first_command:])  # sbatch stops reading there


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_an_option_is_passed_as_it_is_or_refused(value: str) -> None:
    option = f"--job-name={value}"
    try:
        line = directive(option)
    except UserError as error:
        assert "--job-name" in str(error) and str(error).isprintable()
        assert any(character in "\"'\\" or not character.isprintable() for character in value)
        return
    assert len(line.splitlines()) == 1
    quoted = line.removeprefix("#SBATCH ")
    assert quoted == option or (quoted == f'"{option}"' and (" " in option or "#" in option))


@pytest.mark.parametrize("name", ['y"\n#SBATCH "--comment=INJECTED', "x\ntouch here #", "a\\q", "b\x1b[2J", "c\u202ed", "it's"])
def test_names_that_slurm_would_read_otherwise_are_refused(name: str, tmp_path: Path) -> None:
    for made in (
        JobSpec(name, tmp_path / "job", tmp_path),
        JobSpec("name", tmp_path / name / "job", tmp_path),
        spec(tmp_path, partition=name),
        spec(tmp_path, sbatch=[f"--comment={name}".replace("\n", "\x0b")]),
    ):
        for make in (render, lambda one: render_array(one, 2)):
            with pytest.raises(UserError, match="cannot be passed to Slurm"):
                make(made)


def test_a_percent_sign_in_a_folder_is_no_pattern(tmp_path: Path) -> None:
    made = JobSpec("half%natural", tmp_path / "half%natural" / "job", tmp_path)
    assert f"--output={tmp_path}/half%%natural/job/job.log" in directives(render(made))
    assert f"--output={tmp_path}/half%%natural/job/task-%a.log" in directives(render_array(made, 2))


def test_nothing_is_asked_for_that_was_not_wished(tmp_path: Path) -> None:
    names = {option.partition("=")[0] for option in directives(render(spec(tmp_path)))}
    assert not names & {"--partition", "--account", "--qos", "--time", "--mem", "--exclusive", "--cpus-per-task"}


@pytest.mark.parametrize("make", [render, lambda spec: render_array(spec, 6, 3)])
def test_scripts_are_valid_shell_whatever_the_names(make: Callable[[JobSpec], str], tmp_path: Path) -> None:
    container = {"image": "my image.sif", "runtime": "apptainer", "mounts": ["/data:/data"]}
    script = make(spec(tmp_path, env={"A": "it's $HOME"}, setup="module load x", container=container))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_arguments_and_settings_arrive_as_they_are(tmp_path: Path) -> None:
    made = spec(tmp_path, env={"A": "it's $HOME"}, srun=["--mpi=none"])
    head = render(made).partition(': "${LAUNCH')[0] + 'printf "%s\\n" "$@" "$A" "$PYTHON" "${SRUN_OPTIONS[@]}"'
    result = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [*made.arguments, "it's $HOME", sys.executable, "--mpi=none"]


def test_containers_mount_what_a_job_needs(tmp_path: Path) -> None:
    pyxis = ClusterConfig(container=ContainerConfig(image="i.sqsh", mounts=("/data:/data",)))
    options, runner = sbatch.container_command(pyxis, tmp_path, [tmp_path / "job"], gpus=True)
    assert runner == [] and f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/job:{tmp_path}/job,/data:/data" in options
    assert "PYTHON=python\n" in render(spec(tmp_path, container={"image": "i.sqsh"}))
    apptainer = changed(pyxis, container={"image": "i.sif", "runtime": "apptainer"})
    options, runner = sbatch.container_command(apptainer, tmp_path, [], gpus=True)
    assert options == [] and runner[:3] == ["apptainer", "exec", "--nv"] and runner[-1] == "i.sif"


@pytest.mark.parametrize("name", sorted(path.stem for path in (shipped("configs") / "cluster").glob("*.yaml")))
def test_shipped_clusters_are_sound(name: str, tmp_path: Path) -> None:
    cluster = load_cluster(name)
    subprocess.run(["bash", "-n"], input=render(spec(tmp_path, **cluster.model_dump())), text=True, check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu", "did you mean 'partition'"),
        ("time: tomorrow", "d-hh:mm:ss"),
        ("stop_lead_s: 5", "20"),
        ("{time: 5, stop_lead_s: 300}", "leaves nothing of the 300 s"),
        ("sbatch: constraint=ib", "expected options such as"),
        ("env: {A-B: x}", "'A-B' cannot be the name"),
        ("container: {image: x, runtime: docker}", "pyxis"),
    ],
)
def test_wrong_cluster_settings_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cluster(str(file))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:00:00", 3600),
        ("2-0", 172_800),
        ("1-02:30", 95_400),
        ("1-00:00:01", 86_401),
        ("1d", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert time_limit_s(text) == seconds


def test_a_cluster_file_is_read_and_shown_without_running_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "test", lambda script: "would start at once")
    file, mark = tmp_path / "cluster.yaml", tmp_path / "ran"
    touch = f"touch {mark}"
    file.write_text(
        f"setup: ['{touch}', '$({touch})']\nenv: {{A: '`{touch}`', B: '$({touch})'}}\npartition: 'x$({touch})'\n"
        f"gpus_per_node: 1\npython: '/bin/sh -c {touch}'\n"
    )
    code = cli.main(
        ["submit", str(config), "--nodes", "1", "--cluster", str(file), "--dry-run", "--run-dir", str(tmp_path / "run")]
    )
    out = capsys.readouterr().out
    assert code == 0 and touch in out  # it is shown: whoever submits it runs it
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_an_unknown_cluster_is_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean 'cluster/default.yaml'"):
        load_cluster("defualt")


def test_the_shell_scripts_are_valid() -> None:
    for script in [*(ROOT / "launch").iterdir(), ROOT / "tests" / "install-system.sh"]:
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "base.yaml", write_corpus(folder / "corpus"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "--gpus-per-node"),
        (["--nodes", "2", "--gpus-per-node", "0"], "--ranks-per-node"),
        (["--nodes", "2", "--gpus-per-node", "8", "--ranks-per-node", "4"], "one rank per GPU"),
        (["--nodes", "3", "--gpus-per-node", "1"], "train.global_batch_size: 8 is not divisible"),
        (
            ["--nodes", "2", "--gpus-per-node", "1", "parallel.tensor_model_parallel_size=2"],
            "rank 0 on node 1, rank 1 on node 2",
        ),
        (["--nodes", "1", "--gpus-per-node", "1", "data.sources.web.path=/nowhere"], "/nowhere"),
        (["--nodes", "1", "--gpus-per-node", "1", "train.stpes=3"], "did you mean 'train.steps'"),
        (["--nodes", "1", "--gpus-per-node", "1", "--time", "soon"], "time: expected"),
    ],
)
def test_submit_refuses_before_anything_is_written(
    arguments: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["submit", str(config), *arguments, "--run-dir", str(run)]) == 2
    assert message in capsys.readouterr().err and not run.exists()


def test_a_run_on_top_of_something_else_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    before = contents(tmp_path)
    assert cli.main(["submit", str(config), "--nodes", "1", "--gpus-per-node", "1", "--run-dir", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err and contents(tmp_path) == before


def test_a_dry_run_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "test", lambda script: "would start at once")
    run = tmp_path / "run"
    asked = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--cluster",
        "cpu",
        "--dry-run",
        "--run-dir",
        str(run),
        "--",
        "train.steps=7",
    ]
    assert cli.main(["submit", str(config), *asked]) == 0
    out = capsys.readouterr().out
    assert "TP1 x PP1 x DP4" in out and "#SBATCH --nodes=2" in out and not run.exists()


def test_a_copy_of_the_package_runs_by_itself_and_knows_its_commit(tmp_path: Path) -> None:
    words = snapshot.take(tmp_path / "code")
    code = (
        "import megatron_synth, megatron_synth_kernels, pathlib\n"
        "from megatron_synth.train.record.run_dir import git_state\n"
        "print(megatron_synth.__file__, (git_state(pathlib.Path(megatron_synth.__file__).parent) or {}).get('commit', '')[:10])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    file, _, commit = result.stdout.strip().partition(" ")
    assert file == str(tmp_path / "code" / "megatron_synth" / "__init__.py")
    assert commit in words and (bool(commit) == ("of no commit" not in words))
