"""Memory of `prepare` and of the report of duplicates does not grow with the text, and what measures it measures right."""

import gc
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.prepare import corpus as made_up
from benchmarks.prepare import memory
from benchmarks.prepare.cli import main
from benchmarks.prepare.corpus import write_corpus
from benchmarks.prepare.memory import Found, MemoryBench, Step, render
from benchmarks.prepare.proc_sampler import Usage, watch
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data import bpe_cache
from megatron_synth.data.overlap import contamination, minhash, ngrams
from megatron_synth.data.overlap.minhash import find_duplicates
from megatron_synth.data.preparing import pipeline, shuffle, splits
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers import formats
from megatron_synth.data.tokenizer import train_tokenizer

EOD = "<|endoftext|>"
SMALL = {
    bpe_cache: {"WORDS": 2**8},
    formats: {"SAMPLE_BYTES": 2**14},
    splits: {"SMALL_SPLIT": 2**16, "SPLIT_BYTES": 2**16, "STREAMED_BYTES": 2**16, "STREAMED_ABOVE": 2**13},
    pipeline: {"RUN_BYTES": 2**16, "CHUNK_CHARACTERS": 2**13},
    shuffle: {"BUCKET_BYTES": 2**16},
    ngrams: {"BATCH_TOKENS": 2**11, "BATCH_DOCUMENTS": 2**4},
    minhash: {"PARTITION_BYTES": 2**14, "BLOCK": 2**6},
    contamination: {"VALIDATION_NGRAMS": 2**13, "FILTER_BITS": 10},
    made_up: {
        "VOCABULARY": 2**11,
        "SLOTS": 2**13,
        "BOOK_SHARE": 0.0,
        "SIGMA": 0.1,
        "MEDIAN_WORDS": 80,
        "LEAST_WORDS": 3,
        "COPY_SHARE": 0.02,
        "KEPT": 16,
    },
}
"""Every bound, so low that little text goes beyond it."""


@pytest.fixture
def small(monkeypatch):
    for module, values in SMALL.items():
        for name, value in values.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)


def settings(folder, **more):
    files = [str(file) for file in sorted((folder / "corpus").iterdir())]
    return PrepareConfig.model_validate(
        {
            "output": str(folder / "out"),
            "tokenizer": {"path": str(folder.parent / "tokenizer.json")},
            "sources": {"web": {"kind": "natural", "input": files, "holdout": "1/20"}},
            "shard_tokens": 2**16,
            **more,
        }
    )


def peak(work):
    gc.collect()
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.slow
def test_three_times_the_text_takes_no_more_memory(tmp_path, small):
    train_tokenizer(["some text of a few words " * 9], 300, EOD).save(tmp_path / "tokenizer.json")
    packed = {"shuffle": {"seed": 1}, "packing": {"sequence_length": 512}}
    peaks = []
    for number, size in enumerate([60_000, 150_000, 450_000]):  # the first one warms up: imports, caches
        folder = tmp_path / str(number)
        write_corpus(folder / "corpus", size)
        config = settings(folder, **packed)
        sources = [folder / "out" / name for name in ("web", "web-valid")]
        peaks.append((peak(lambda config=config: prepare(config)), peak(lambda sources=sources: find_duplicates(sources))))
    # some kB for each token run are kept, which here has 64 kB and 16 MiB in a run; the text grows by 300 kB, its tokens by 600
    assert all(more - less < 200_000 for less, more in zip(*peaks[1:], strict=True)), peaks


def test_the_report_finds_what_was_copied(tmp_path, small):
    train_tokenizer(["some text of a few words " * 9], 300, EOD).save(tmp_path / "tokenizer.json")
    corpus = write_corpus(tmp_path / "a" / "corpus", 400_000, compressed=False)
    lines = [line for file in corpus.files for line in file.read_text().splitlines()]
    texts = Counter(json.loads(line)["text"] for line in lines)
    assert corpus.documents == len(lines) == texts.total() and corpus.text_bytes == sum(
        len(text.encode()) * count for text, count in texts.items()
    )
    assert corpus.copies == texts.total() - len(texts) > 3
    assert any(not text.isascii() for text in texts) and any(text.isascii() for text in texts)
    prepare(settings(tmp_path / "a"))
    report = find_duplicates([tmp_path / "a" / "out" / name for name in ("web", "web-valid")])
    assert report.redundant == corpus.copies
    assert sum(one.exact for one in report.shared) == sum(count for count in texts.values() if count > 1)


def test_pages_of_columns_are_given_back(tmp_path):
    size = 2**22

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssFile:", "RssShmem:")))

    column = minhash._Column(tmp_path / "c", np.dtype(np.uint64), size)
    before = resident()
    column.values[:] = 7
    assert resident() - before > 0.9 * 8 * size
    column.release()
    assert resident() - before < 0.1 * 8 * size
    assert (column.values == 7).all() and (np.fromfile(tmp_path / "c", np.uint64) == 7).all()


def test_children_are_measured_with_their_parent(tmp_path, monkeypatch):
    seen, sample = tmp_path / "seen", Usage.sample

    def sampled(self, process):
        sample(self, process)
        if self.anonymous > 90 << 20:
            seen.touch()

    monkeypatch.setattr(Usage, "sample", sampled)
    # both live until both were seen at their full size; the limit ends a test that fails
    child = "import os, time; held = bytearray(b'x') * (60 << 20); end = time.monotonic() + 60\n"
    child += f"while not os.path.exists({str(seen)!r}) and time.monotonic() < end: time.sleep(0.01)"
    parent = f"import subprocess, sys; held = bytearray(b'x') * (30 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    usage = watch(process)
    assert process.returncode == 0 and len(usage.cpu_s) == 2
    assert 90 << 20 < usage.anonymous <= usage.pss <= usage.rss < 200 << 20


def test_the_table_shows_each_step_and_what_was_found():
    step = Step("prepare", 5 * 10**8, 1000, 10**8, 2, 50.0, 80.0, 300 << 20, 400 << 20, 250 << 20)
    report = Step("duplicates", 5 * 10**8, 1000, 10**8, 1, 50.0, 80.0, 300 << 20, 400 << 20, 250 << 20)
    head = {"command": "c", "date": "d", "git": None, "device": "x", "threads": 1, "versions": {}}
    lines = render(head, MemoryBench((step, report), (Found(3, 6, 2, 10),))).splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| prepare")).split("|")[1:-1]]
    assert cells == ["prepare", "2", "500", "1,000", "100,000,000", "50", "1,250,000", "300", "250", "400"]
    assert any("duplicates found in 500 MB: 6 documents of 3 copies" in line for line in lines)


@pytest.mark.parametrize("size", ["0", "x", "5,", "-1"])
def test_sizes_are_megabytes(size):
    with pytest.raises(UserError, match="--memory: expected megabytes"):
        main(["--memory", size])


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "DISK_PER_TEXT", 1e12)
    with pytest.raises(UserError, match="GB needed; give another --folder"):
        main(["--memory", "1", "--folder", str(tmp_path)])
    assert not any(tmp_path.iterdir())
