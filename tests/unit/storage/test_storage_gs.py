"""`gs://` against an emulator: text is read and prepared, a prepared source is copied, objects are written and removed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from tests.support import child_environment
from tests.unit.data.preparing.support import tree

# in a process of its own, whose threads and warnings nobody else has
RUN = """
import os, socket, sys
from pathlib import Path
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", port, in_memory=True, default_bucket="corpora")
server.start()
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.staging.copies import stage
from megatron_synth.storage import objects
from megatron_synth.storage.remote import remote

settings, given, copies = sys.argv[1:]
for path in sorted(Path(given).rglob("*")):
    if path.is_file():
        objects.upload(path, remote(f"gs://corpora/{path.relative_to(given)}"))
prepare(PrepareConfig.model_validate_json(settings))
stage(remote("gs://corpora/prepared/web"), Path(copies))
place = remote("gs://corpora/in/a.jsonl")
assert objects.read_range(place, 10, 20) == (Path(given) / "in" / "a.jsonl").read_bytes()[10:20]
objects.write(place, b"other")
assert objects.read(place) == b"other"
objects.remove(place)
objects.remove(place)
try:
    objects.look(place)
except UserError as error:
    print(error)
server.stop()
"""


def test_text_shards_and_objects_of_a_bucket(tmp_path) -> None:
    for name in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(name, reason=f"{name} is not installed; make test-extras")
    given = tmp_path / "given"
    (given / "in").mkdir(parents=True)
    for name, count in (("a", 2000), ("b", 300)):
        lines = (json.dumps({"text": f"{name} {number} " * 30}) for number in range(count))
        (given / "in" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def config(output: str, text: str) -> PrepareConfig:
        source = {"kind": "natural", "input": f"{text}/in/*.jsonl"}
        tokenizer = {"train": {"vocab_size": 300, "max_bytes": 100_000}}
        return PrepareConfig.model_validate({"output": output, "tokenizer": tokenizer, "sources": {"web": source}})

    prepare(config(str(given / "prepared"), str(given)))
    expected = {name: data for name, data in tree(given / "prepared" / "web").items() if "shard" in name}
    settings = config(str(tmp_path / "out"), "gs://corpora").model_dump_json()
    command = [sys.executable, "-c", RUN, settings, str(given), str(tmp_path / "copies")]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {name: data for name, data in tree(tmp_path / "out" / "web").items() if "shard" in name} == expected
    (copy,) = (tmp_path / "copies").glob("web-*")
    assert {path.name: path.read_bytes() for path in copy.glob("shard*")} == expected
    assert "gs://corpora/in/a.jsonl: could not find it: there is no such object" in done.stdout
