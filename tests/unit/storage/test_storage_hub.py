"""`hf://` against a stand-in for the Hub: text is read and prepared, and a prepared source is copied."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from tests.support import child_environment
from tests.unit.data.preparing.support import tree

REPOSITORY = "someone/corpus"

READ = """
import json, sys
from pathlib import Path
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.staging.copies import stage
from megatron_synth.storage import objects
from megatron_synth.storage.remote import remote

settings, root, copies = sys.argv[1:]
prepare(PrepareConfig.model_validate_json(settings))
stage(remote(f"{root}/prepared/web"), Path(copies))
for name in (f"{root}/in/none.jsonl", "hf://datasets/someone/none/a.jsonl"):
    try:
        objects.look(remote(name))
    except UserError as error:
        print(error)
"""


def entry(path: Path, name: str) -> dict:
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server with one repository of data sets, the files of a folder; its address, and what was asked for in ranges."""
    ranges: list[str] = []
    base, files = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/main/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def tell(self, found: object) -> None:
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def refuse(self, code: str) -> None:
            self.answer(404, json.dumps({"error": code}).encode(), X_Error_Code=code, Content_Type="application/json")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path in (base, f"{base}/revision/main"):
                self.tell({"id": REPOSITORY, "sha": "1" * 40, "private": False, "tags": [], "siblings": []})
            elif path.startswith(f"{base}/tree/main") and (folder / path.removeprefix(f"{base}/tree/main").strip("/")).is_dir():
                within = folder / path.removeprefix(f"{base}/tree/main").strip("/")
                deep = "recursive=true" in self.path.lower()
                found = sorted(within.rglob("*") if deep else within.iterdir())
                self.tell([entry(one, one.relative_to(folder).as_posix()) for one in found])
            elif path.startswith(files) and (folder / path.removeprefix(files)).is_file():
                self.send_file(path, (folder / path.removeprefix(files)).read_bytes())
            else:
                self.refuse("EntryNotFound" if path.startswith((base + "/", files)) else "RepoNotFound")

        def send_file(self, path: str, data: bytes) -> None:
            tag, asked = f'"{hashlib.sha1(data).hexdigest()}"', self.headers.get("Range")
            if asked is None:
                self.answer(200, data, ETag=tag)
                return
            ranges.append(path)
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1 if last else None]
            end = int(first) + len(part) - 1
            self.answer(206, part, ETag=tag, Content_Range=f"bytes {first}-{end}/{len(data)}")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            names = parse_qs(body.decode()).get("paths", [])
            if self.headers["Content-Type"].startswith("application/json"):
                names = json.loads(body)["paths"]
            if urlsplit(self.path).path == f"{base}/paths-info/main":
                self.tell([entry(folder / name, name) for name in names if (folder / name).exists()])
            else:
                self.refuse("RepoNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", ranges
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_text_and_shards_of_a_repository_have_the_bytes_of_files(tmp_path) -> None:
    repository = tmp_path / "repository"
    for name, count in (("a", 2000), ("b", 300)):
        lines = (json.dumps({"text": f"{name} {number} " * 30}) for number in range(count))
        (repository / "in").mkdir(parents=True, exist_ok=True)
        (repository / "in" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def config(output: Path, text: str) -> PrepareConfig:
        source = {"kind": "natural", "input": f"{text}/in/*.jsonl"}
        tokenizer = {"train": {"vocab_size": 300, "max_bytes": 100_000}}
        return PrepareConfig.model_validate({"output": str(output), "tokenizer": tokenizer, "sources": {"web": source}})

    prepare(config(repository / "prepared", str(repository)))
    expected = {name: data for name, data in tree(repository / "prepared" / "web").items() if "shard" in name}
    root = f"hf://datasets/{REPOSITORY}"
    with hub(repository) as (address, ranges):
        home = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-c", READ, config(tmp_path / "out", root).model_dump_json(), root, str(tmp_path / "copies")]
        done = subprocess.run(command, env=child_environment() | home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {name: data for name, data in tree(tmp_path / "out" / "web").items() if "shard" in name} == expected
    (copy,) = (tmp_path / "copies").glob("web-*")
    assert {path.name: path.read_bytes() for path in copy.glob("shard*")} == expected
    assert any(path.endswith("/in/a.jsonl") for path in ranges) and any(path.endswith(".bin") for path in ranges)
    missing = done.stdout.splitlines()
    assert missing[0].startswith(f"{root}/in/none.jsonl: could not find it: there is no such object"), done.stdout
    assert missing[1].startswith("hf://datasets/someone/none/a.jsonl: could not find it: there is no such"), done.stdout
