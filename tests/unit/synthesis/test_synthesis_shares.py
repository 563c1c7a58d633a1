"""Several processes answer one output: the same bytes as one, each request asked once, and locks that keep them apart."""

from __future__ import annotations

import json

import pytest

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.cli.main import main
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.core.lock import Held, Lock
from megatron_synth.synthesis.answers.parts import keys_of
from megatron_synth.synthesis.run import ENGINE, engine_facts, run
from megatron_synth.synthesis.setup import ANSWERS
from megatron_synth.synthesis.shares import Share
from megatron_synth.synthesis.status import status_text
from tests.unit.synthesis.test_run import product


def test_any_number_of_shares_makes_the_bytes_of_one_run(synthesis, tmp_path):
    parents = tmp_path / "parents.jsonl"
    lines = parents.read_text().splitlines()
    more = [json.dumps({"text": f"A short one, number {number}."}) for number in range(40)]  # joined with each other
    parents.write_text("\n".join([*lines, *more, *lines[:10]]) + "\n")  # ten are there twice
    with RunningStub() as stub:
        one = synthesis(stub.url, "one")
        whole = run(one)
        for of in (1, 3):
            config = synthesis(stub.url, f"shares-{of}")
            found = [run(config, share=Share(number, of)) for number in range(of)]
            assert [outcome.missing for outcome in found] == [0] * of
            assert sum(outcome.made for outcome in found) == whole.made
            assert all(outcome.made for outcome in found)
            seen = stub.seen.requests
            assert run(config, ask=False).account == whole.account
            assert stub.seen.requests == seen
            assert product(config.folder) == product(one.folder)
        assert "share-00002-of-00003" in status_text(config)


def test_what_a_share_has_answered_is_not_asked_again_by_any_other_run(synthesis):
    with RunningStub() as stub:
        one = synthesis(stub.url, "one")
        whole = run(one)
        config = synthesis(stub.url)
        first = run(config, share=Share(0, 3)).made
        second = run(config, share=Share(0, 2)).made  # another number: a third of these is answered already
        rest = run(config)
        assert first and second and rest.made
        assert first + second + rest.made == whole.made == len(list(keys_of(config.folder / ANSWERS)))
        assert product(config.folder) == product(one.folder)


def test_a_run_of_the_whole_and_shares_keep_apart(synthesis):
    with RunningStub() as stub:
        config = synthesis(stub.url)
        share = config.folder / ANSWERS / Share(1, 2).folder
        share.mkdir(parents=True)
        with Lock(share / "run.lock", "synthesize run --share 1/2"):
            run(config, share=Share(0, 2))
            for other in (None, Share(1, 2), Share(1, 3)):
                with pytest.raises(Held, match="in use by"):
                    run(config, share=other)
        with Lock(config.folder / "run.lock", "synthesize run"), pytest.raises(Held, match="in use by"):
            run(config, share=Share(1, 2))
        assert run(config).record is not None


def test_facts_of_engines_that_differ_are_all_told(tmp_path):
    for number, version in enumerate(("1", "1", "2")):
        folder = tmp_path / ANSWERS / Share(number, 3).folder
        folder.mkdir(parents=True)
        (folder / ENGINE).write_text(json.dumps({"engine": "vllm", "version": version}))
    assert engine_facts(tmp_path) == {"engine": "vllm", "version": ["1", "2"]}


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "0/1000000", "a/b", "1/2/3"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="expected NUMBER/OF"):
        Share.parse(text)


def test_options_that_do_not_belong_together_are_refused(synthesis, capsys):
    with RunningStub() as stub:
        config = synthesis(stub.url)
        file = config.folder.with_suffix(".yaml")
        file.write_text(to_yaml(config))
        for options, told in (
            (["--nodes", "2"], "--nodes: is for --slurm"),
            (["--dry-run"], "--dry-run: is for --slurm"),
            (["--slurm"], "--nodes: say on how many"),
            (["--judge"], "requests have no answer, more than max_unanswered"),
            (
                ["--slurm", "--nodes", "2", "engine.name=vllm", "engine.servers=[]", "--gpus-per-node", "8"],
                "copies x tensor_parallel_size",
            ),
        ):
            assert main(["synthesize", "run", str(file), *options]) == 2
            assert told in capsys.readouterr().err
