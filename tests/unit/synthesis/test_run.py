"""Whole runs against a server without a model: resumed, disturbed, refused, gone, and the account of each."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing.readers.synthesized import read_record
from megatron_synth.synthesis import run as run_module
from megatron_synth.synthesis.answers.parts import keys_of, lines
from megatron_synth.synthesis.engines.http import Address
from megatron_synth.synthesis.engines.protocol import queue_of
from megatron_synth.synthesis.engines.server import Server
from megatron_synth.synthesis.report import write_report
from megatron_synth.synthesis.run import run
from megatron_synth.synthesis.setup import ANSWERS
from megatron_synth.synthesis.status import status_text

FAULTS = {"429": 0.06, "500": 0.06, "slow": 0.04, "drop": 0.06, "json": 0.06, "truncated": 0.06, "empty": 0.06}
FAULTS |= {"two": 0.05, "model": 0.05}


def product(folder: Path) -> dict[str, bytes]:
    """What is made, byte by byte: the corpus, what was rejected, and the record."""
    files = [*sorted((folder / "corpus").iterdir()), folder / "rejected.jsonl", folder / "synthesis.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_asked_once_whatever_the_server_does_and_the_same_bytes_for_any_concurrency(synthesis):
    with RunningStub() as stub:
        config = synthesis(stub.url)
        whole = run(config)
        assert whole.account is not None
        assert whole.record is not None
        assert whole.account.asked == whole.made > 60
        assert whole.account.asked == whole.account.kept + sum(whole.account.rejected.values())
        assert whole.record.documents
        seen = stub.seen.requests
        again = run(config)
        assert stub.seen.requests == seen  # nothing is asked again, not even whether the server is there
        assert (again.account, again.record) == (whole.account, whole.record)
        one = synthesis(stub.url, "one", engine={"concurrency": 1})
        run(one)
        assert product(one.folder) == product(config.folder)
    with RunningStub(faults=FAULTS, slow_s=0.05) as stub:
        disturbed = synthesis(stub.url, "disturbed", engine={"concurrency": 16})
        found = run(disturbed)
        assert found.account == whole.account
        assert product(disturbed.folder) == product(config.folder)
        keys = list(keys_of(disturbed.folder / ANSWERS))
        assert len(keys) == len(set(keys)) == whole.account.asked
        assert stub.seen.requests > whole.account.asked + 20


def test_another_setting_asks_again_and_another_filter_does_not(synthesis):
    with RunningStub() as stub:
        first = run(synthesis(stub.url))
        asked = stub.seen.requests
        assert run(synthesis(stub.url, max_unanswered=3)).made == 0
        assert stub.seen.requests == asked
        second = run(synthesis(stub.url, sampling={"temperature": 0.9}))
        assert second.made == first.made
        both = synthesis(stub.url)
        assert len(list(keys_of(both.folder / ANSWERS))) == 2 * first.made
        assert run(both).account == first.account  # the first answers are still there


def test_more_parents_ask_for_the_new_ones_alone(synthesis):
    with RunningStub() as stub:
        limited = synthesis(stub.url, parents={"web": {**_parents(synthesis), "max_documents": 10}})
        first = run(limited)
        all_of_them = run(synthesis(stub.url))
        assert first.account is not None
        assert all_of_them.account is not None
        assert all_of_them.made == all_of_them.account.asked - first.account.asked > 0


def _parents(synthesis) -> dict:
    return synthesis("http://x").parents["web"].model_dump(exclude_none=True)


def test_a_prompt_that_the_engine_refuses_is_counted_and_not_asked_again(synthesis):
    word = "Harvest"
    with RunningStub(refuse=word) as stub:
        config = synthesis(stub.url, sampling={"temperature": 0.5})
        found = run(config)
        assert found.account is not None
        expected = sum(word in line["text"] or line["finish"] == "refused" for line in lines(config.folder / ANSWERS))
        assert 0 < found.account.refused <= expected
        assert found.account.asked == found.account.refused + found.account.kept + sum(found.account.rejected.values())
        assert run(config).made == 0
        told = [line["text"] for line in lines(config.folder / ANSWERS) if line["finish"] == "refused"]
        assert set(told) == {"status 400: not this one"}


def when(stub: RunningStub, requests: int, **behavior) -> threading.Thread:
    """Change a server's behavior once it has seen so many requests."""

    def change():
        deadline = time.monotonic() + 30
        while stub.seen.requests < requests and time.monotonic() < deadline:
            time.sleep(0.0005)
        for name, value in behavior.items():
            setattr(stub.behavior, name, value)

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    return thread


def test_requests_that_fail_each_time_stay_unanswered_and_are_asked_next_time(synthesis):
    with RunningStub(rate=300) as stub:
        config = synthesis(stub.url, engine={"attempts": 1, "breaker": 1000})
        when(stub, 30, faults={"500": 0.3}, rate=0)
        found = run(config)
        assert found.account is not None
        assert found.account.unanswered > 0
        assert found.record is None
        assert not (config.folder / "corpus").exists()
        stub.behavior.faults = {}
        rest = run(config)
        assert rest.made == found.account.unanswered
        assert rest.account is not None
        assert rest.account.unanswered == 0
        assert rest.record is not None


def test_a_server_that_goes_away_ends_the_run_and_the_next_one_goes_on(synthesis):
    with RunningStub() as stub:
        whole = run(synthesis(stub.url, "whole"))
        config = synthesis(stub.url, engine={"patience_s": 0.5, "breaker": 3, "attempts": 100})
        stub.seen.requests, stub.behavior.rate = 0, 300
        when(stub, 40, model="another", faults={"drop": 1.0}, missing=True)
        gone = run(config)
        assert gone.gone is not None
        assert gone.gone.startswith("no server has answered for")
        assert gone.account is None
        assert gone.made == len(list(keys_of(config.folder / ANSWERS)))
        stub.behavior.faults, stub.behavior.missing, stub.behavior.model = {}, False, "stub"
        rest = run(config)
        assert rest.account == whole.account
        assert gone.made + rest.made == whole.made
        assert product(config.folder) == product(synthesis(stub.url, "whole").folder)


def test_a_request_to_stop_keeps_what_came(synthesis):
    with RunningStub() as stub:
        config = synthesis(stub.url, engine={"concurrency": 2})
        stopped = run(config, lambda: stub.seen.requests > 30)
        assert stopped.account is None
        assert stopped.gone is None
        assert 0 < stopped.made < 40
        assert run(config).account is not None


def test_after_a_request_to_stop_nothing_is_tried_again(synthesis):
    with RunningStub(rate=300) as stub:
        config = synthesis(stub.url, engine={"breaker": 10_000, "attempts": 100, "backoff_s": 30, "patience_s": 600})
        when(stub, 30, faults={"500": 1.0})
        stopped = run(config, lambda: stub.seen.requests > 40)  # what has failed would come back after half a minute
        assert stopped.account is None
        assert stopped.made < 40


def test_two_servers_share_the_work_and_one_may_fail(synthesis):
    with RunningStub(rate=300) as first, RunningStub(rate=300) as second:
        config = synthesis(first.url, engine={"servers": [first.url, second.url], "breaker": 2})
        when(second, 20, status=500)
        found = run(config)
        assert found.account is not None
        assert found.account.unanswered == 0
        assert first.seen.requests > 20


def test_another_run_on_the_same_output_is_refused(synthesis, monkeypatch):
    with RunningStub() as stub:
        config = synthesis(stub.url)
        errors: list[UserError] = []

        def second(*arguments):
            with pytest.raises(UserError) as caught:
                run(config)
            errors.append(caught.value)
            raise KeyboardInterrupt

        monkeypatch.setattr(run_module, "make_corpus", second)
        with pytest.raises(KeyboardInterrupt):
            run(config)
        assert str(config.folder) in str(errors[0])


def test_the_key_is_sent_and_stands_in_no_file(synthesis, monkeypatch):
    monkeypatch.setenv("STUB_KEY", "geheim-1234567890")
    with RunningStub(key="geheim-1234567890") as stub:
        config = synthesis(stub.url, engine={"key_variable": "STUB_KEY"})
        assert run(config).record is not None
        files = [file for file in config.folder.rglob("*") if file.is_file()]
        assert len(files) > 5
        assert not any(b"geheim" in file.read_bytes() for file in files)


def test_status_and_report_tell_what_was_made(synthesis):
    with RunningStub() as stub:
        config = synthesis(stub.url)
        assert "nothing has been made yet" in status_text(config)
        found = run(config)
        assert found.account is not None
        text = status_text(config)
        assert f"{found.account.asked:,} answers" in text
        assert "kept" in text
        report = write_report(config).read_text()
        assert "Samples beside their parents" in report
        assert "KL" in report
        (first, *_) = (config.folder / "corpus" / "part-00000.jsonl").read_text().splitlines()
        assert first
        assert "Moreover," in report  # of the stub
        assert report.count("<pre>") >= 10  # five samples, each beside its parent


def test_the_record_of_a_corpus_is_checked(synthesis):
    with RunningStub() as stub:
        config = synthesis(stub.url)
        run(config)
    file = config.folder / "synthesis.json"
    record = json.loads(file.read_text())
    record["account"]["kept"] += 1
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="its account does not add up"):
        read_record(config.folder)
    record["account"]["kept"] -= 1
    file.write_text(json.dumps({**record, "files": ["../../etc/passwd"]}))
    with pytest.raises(UserError, match="expected a plain name"):
        read_record(config.folder)


def test_concurrency_follows_what_the_server_tells():
    server = Server(Address("http://x/v1"), most=100, breaker=3, queue=4)
    server.limit = server.in_flight = 50
    server.told(waiting=24)
    assert server.limit == 30
    server.in_flight = 30
    server.told(waiting=0)
    assert server.limit == 37
    server.busy()
    assert server.limit == 18
    server.busy()  # several replies of one moment count once
    assert server.limit == 18
    for _ in range(18):
        server.succeeded()
    assert server.limit == 19
    for _ in range(3):
        server.failed("x")
    assert not server.may_send(0)
    server.up()
    assert server.may_send(0)
    assert not server.may_send(19)


def test_the_queue_is_read_from_metrics():
    text = (
        '# HELP vllm:num_requests_waiting\nvllm:num_requests_running{model="a"} 3.0\nvllm:num_requests_waiting{model="a"} 7.0\n'
    )
    assert queue_of(text) == (3, 7)
    assert queue_of("vllm:num_requests_running 1\nvllm:num_requests_waiting x\n") == (1, 0)
    assert queue_of("vllm:num_requests_running nan\n") is None
    assert queue_of("process_cpu_seconds_total 3") is None


def test_a_free_port_without_a_server_is_told(synthesis):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=r"engine.servers: .*: no answer .*start the server, or correct the address"):
        run(synthesis(url))
