"""A preparation by the nodes of a Ray cluster: the bytes of one machine, a node killed in the middle; and what is refused."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_synth.cli.prepare import main
from megatron_synth.cluster import ray_tasks
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.journal import JOURNAL, read_journal
from tests.support import ROOT
from tests.unit.data.preparing.support import tree, write_texts

LINES = 2000


def write(folder: Path, output: str) -> Path:
    """A text of some megabytes in splits of half a megabyte, and what to prepare of it; all names are relative."""
    write_texts(folder / "in", lines=LINES)
    file = folder / f"{output}.yaml"
    file.write_text(
        f"output: {output}\n"
        "tokenizer: {train: {vocab_size: 400, max_bytes: 100000}}\n"
        'sources: {web: {kind: natural, input: "in/*.jsonl", holdout: 1/20}}\n'
        "shuffle: {seed: 3}\nshard_tokens: 500000\n"
    )
    return file


def begin(folder: Path, output: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_synth", "prepare", str(write(folder, output)), *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def told(folder: Path, output: str) -> list[dict]:
    """What the journal of an output that is being made tells of."""
    return [entry for file in folder.glob(f".{output}.partial-*/{JOURNAL}") for entry in read_journal(file)[1:]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of ray's own, when its nodes are started
def test_two_nodes_of_which_one_is_killed_write_the_bytes_of_one_machine(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed: make test-extras")
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    for name, value in {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": soon})
    try:
        victim = cluster.add_node(**node)
        ours = begin(tmp_path, "ray", "--ray", cluster.address)
        while len([entry for entry in told(tmp_path, "ray") if entry["kind"] == "split"]) < 3:
            assert ours.poll() is None, ours.communicate()[0]
            time.sleep(0.02)
        cluster.remove_node(victim, allow_graceful=False)  # SIGKILL to all that runs there
        said = ours.communicate()[0]
        assert ours.returncode == 0 and "Ray: 2 nodes, 2 processors" in said, said
    finally:
        cluster.shutdown()
    alone = begin(tmp_path, "alone", "--workers", "1")
    assert alone.wait() == 0, alone.communicate()[0]
    found, expected = tree(tmp_path / "ray"), tree(tmp_path / "alone")
    assert len([name for name in found if name.endswith(".bin")]) > 3
    found.pop("prepare.json"), expected.pop("prepare.json")
    assert found == expected
    assert not list(tmp_path.glob(".ray*"))


@pytest.mark.parametrize("address", ["", "6379", "host:", "host:0", "host:70000", "ray://host:10001", "local", "a b"])
def test_what_is_no_address_is_refused(tmp_path, address) -> None:
    with pytest.raises(
        UserError, match=r"--ray: expected HOST:PORT of a Ray cluster's head, such as 10\.0\.0\.1:6379, or auto"
    ):
        main([str(write(tmp_path, "out")), "--ray", address])


def test_an_address_where_nobody_answers_is_refused_at_once(tmp_path) -> None:
    with socket.socket() as bound:  # nobody listens
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--ray {address}: nobody answers there .*`ray start --head`"):
            main([str(write(tmp_path, "out")), "--ray", address])


def test_without_ray_it_is_said_what_to_install(tmp_path, monkeypatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else known(name, *more))
    with pytest.raises(UserError, match=r"needs the package ray; pip install 'megatron-synth\[ray\]' here and on each node"):
        main([str(write(tmp_path, "out")), "--ray", "auto"])


def test_options_that_do_not_go_together_are_refused(tmp_path) -> None:
    file = str(write(tmp_path, "out"))
    for options, message in {
        ("--ray", "auto", "--slurm"): "--slurm and --ray: one of them at a time",
        ("--ray", "auto", "--share", "0/2"): "--share and --ray: one of them",
        ("--ray", "auto", "--workers", "2"): "--workers: not with --ray",
        ("--ray", "auto", "--tasks", "2"): "--tasks: is for --slurm",
    }.items():
        with pytest.raises(UserError, match=message):
            main([file, *options])


class Node:
    """Stands in for the package `ray` with one node, on which `look` happens."""

    class exceptions:
        class GetTimeoutError(Exception):
            pass

        class RayError(Exception):
            pass

    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node),
    )

    def __init__(self, look, cpus=4):
        self._look, self._cpus = look, cpus

    def nodes(self):
        resources = {"CPU": float(self._cpus)} if self._cpus else {}
        return [
            {"Alive": True, "NodeID": "1", "NodeManagerHostname": "n1", "NodeManagerAddress": "10.1", "Resources": resources}
        ]

    def remote(self, function):
        def options(**_):
            return SimpleNamespace(remote=lambda *arguments: (function, arguments))

        return SimpleNamespace(options=options)

    def get(self, future, timeout):
        function, arguments = future
        return self._look(function, *arguments)


def without_change(function, *arguments):
    return function(*arguments)


def test_a_node_that_does_not_see_what_it_needs_or_has_another_version_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "out")
    source = {"kind": "natural", "input": "in/*.jsonl"}
    settings = {"output": "made/out", "tokenizer": {"train": {"vocab_size": 400}}, "sources": {"web": source}}
    config = PrepareConfig.model_validate(settings)

    def check(look, cpus=4) -> None:
        ray_tasks._check_nodes(Node(look, cpus), config)
        assert not list((tmp_path / "made").iterdir())

    def timeout(*_):
        raise Node.exceptions.GetTimeoutError

    def failed(*_):
        raise Node.exceptions.RayError("Traceback\nModuleNotFoundError: No module named 'megatron_synth'\n")

    check(without_change)
    assert capsys.readouterr().err == "Ray: 1 node, 4 processors\n"
    other = replace(ray_tasks.versions(), libraries=(("numpy", "1.0"), *ray_tasks.versions().libraries[1:]))
    cases = {
        r"node n1 \(10\.1\) does not see .*made; the output": lambda look, folder, mark, files: look(
            folder, mark.with_name("elsewhere"), files
        ),
        r"does not see .*/else; the output": lambda look, folder, mark, files: look(folder / "else", mark, files),
        r"does not see in/9\.jsonl; .* \(text may be in a bucket\)": lambda look, folder, mark, files: look(
            folder, mark, [*files, Path("in/9.jsonl")]
        ),
        r"has numpy 1\.0, here it is": lambda *_: (other, None),
        r"has other code of megatron-synth": lambda *_: (replace(ray_tasks.versions(), code="0"), None),
        r"did nothing in 120 s; look at it with `ray status`": timeout,
        r"cannot run this program \(ModuleNotFoundError: No module named 'megatron_synth'\); install the same": failed,
    }
    for message, look in cases.items():
        with pytest.raises(UserError, match=message):
            check(look)
    with pytest.raises(UserError, match="no node of the cluster has a processor to give"):
        check(without_change, cpus=0)
