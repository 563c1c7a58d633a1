"""The contenders of `python -m benchmarks duplicates`, each run as a script: NAME TEXT PREPARED.

It prints a line of JSON: seconds, cpu_s, peak bytes, and the pairs that it found. Peers may live in another environment, so
nothing of this project is imported up here.

All have 8-grams of words, 128 values of MinHash where their number can be chosen, bands for a similarity of 0.8, and leave it
to the estimate whether a pair is alike.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHINGLE, THRESHOLD, VALUES = 8, 0.8, 128
Pairs = list[tuple[int, int]]


def _texts(file: Path) -> Iterator[list[str]]:
    for number, line in enumerate(file.open()):
        words = json.loads(line)["text"].split()
        yield [" ".join(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)]
        assert number >= 0


def ours(file: Path, prepared: Path) -> Callable[[], Pairs]:
    """Of tokens, which are the words' numbers: what `prepare duplicates` does."""
    from megatron_synth.data.overlap import minhash

    found: Pairs = []
    compare = minhash._alike

    def noted(documents, starts, *rest):  # type: ignore[no-untyped-def]
        for pairs in compare(documents, starts, *rest):
            found.extend(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))
            yield pairs

    minhash._alike = noted

    def run() -> Pairs:
        minhash.find_duplicates([prepared], shingle=SHINGLE, threshold=THRESHOLD)
        return found

    return run


def datasketch(file: Path, prepared: Path) -> Callable[[], Pairs]:
    """MinHash and MinHashLSH in memory."""
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found, unused-ignore]

    def sketch(grams: list[str]) -> Any:
        own = MinHash(num_perm=VALUES)
        own.update_batch([gram.encode() for gram in set(grams)])
        return own

    return lambda: _one_by_one(file, MinHashLSH(threshold=THRESHOLD, num_perm=VALUES), sketch)


def rensa(file: Path, prepared: Path) -> Callable[[], Pairs]:
    """RMinHash and RMinHashLSH, in Rust."""
    from rensa import RMinHash, RMinHashLSH  # type: ignore[import-not-found, unused-ignore]

    def sketch(grams: list[str]) -> Any:
        own = RMinHash(num_perm=VALUES, seed=1)
        own.update(grams)
        return own

    return lambda: _one_by_one(file, RMinHashLSH(threshold=THRESHOLD, num_perm=VALUES, num_bands=16), sketch)


def _one_by_one(file: Path, index: Any, sketch: Callable[[list[str]], Any]) -> Pairs:
    """Pairs of an index that holds sketches of texts: each text is asked for before it is put in, and estimated again."""
    kept: dict[int, Any] = {}
    found: Pairs = []
    for number, grams in enumerate(_texts(file)):
        if not grams:
            continue
        own = kept[number] = sketch(grams)
        found += [(other, number) for other in index.query(own) if own.jaccard(kept[other]) >= THRESHOLD]
        index.insert(number, own)
    return found


def gaoya(file: Path, prepared: Path) -> Callable[[], Pairs]:
    """Its index of texts, which makes the n-grams itself, in Rust, and estimates again."""
    from gaoya.minhash import MinHashStringIndex  # type: ignore[import-not-found, unused-ignore]

    def run() -> Pairs:
        index = MinHashStringIndex(
            hash_size=32,
            jaccard_threshold=THRESHOLD,
            num_bands=16,
            band_size=8,
            analyzer="word",
            lowercase=False,
            ngram_range=(SHINGLE, SHINGLE),
        )
        found: Pairs = []
        for number, line in enumerate(file.open()):
            text = json.loads(line)["text"]
            if text.count(" ") >= SHINGLE - 1:
                found += [(other, number) for other in index.query(text)]
                index.insert_document(number, text)
        return found

    return run


def datatrove(file: Path, prepared: Path) -> Callable[[], Pairs]:
    """The first three steps of its MinHash pipeline, in files; a cluster is a chain of pairs. It does not estimate again."""
    from datatrove.pipeline.dedup import (  # type: ignore[import-not-found, unused-ignore]
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
        minhash,  # type: ignore[import-not-found, unused-ignore]
    )
    from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found, unused-ignore]
    from datatrove.utils.text import TextNormConfig  # type: ignore[import-not-found, unused-ignore]

    class Words:
        """In place of its English tokenizer, which is downloaded: the words of all others here."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

    minhash.load_word_tokenizer = lambda language: Words()
    as_it_is = TextNormConfig(
        lowercase=False,
        norm_whitespace=False,
        remove_punctuation=False,
        norm_unicode_diacritics=False,
        norm_numbers=False,
        norm_weekdays=False,
        norm_monthnames=False,
    )

    def run() -> Pairs:
        folder = Path(tempfile.mkdtemp())
        (folder / "in").mkdir()
        (folder / "in" / "0.jsonl").write_bytes(file.read_bytes())
        config = minhash.MinhashConfig(n_grams=SHINGLE, num_buckets=16, hashes_per_bucket=8, norm_config=as_it_is)
        documents = JsonlReader(str(folder / "in"))(rank=0, world_size=1)
        MinhashDedupSignature(str(folder / "signatures"), config=config).run(documents, rank=0, world_size=1)
        for bucket in range(config.num_buckets):
            step = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)
            step.run(None, rank=bucket, world_size=config.num_buckets)
        step = MinhashDedupCluster(str(folder / "buckets"), str(folder / "ids"), config=config, save_cluster_id=True)
        step.run(None, 0, 1)
        pairs = []
        for part in (folder / "buckets").glob("*.dups"):
            data = part.read_bytes()
            numbers = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
            pairs += [(numbers[at + 1], numbers[at + 3]) for at in range(0, len(numbers), 4)]
        return sorted(set(pairs))

    return run


CONTENDERS = {one.__name__: one for one in (ours, datasketch, rensa, gaoya, datatrove)}


def _peak() -> int:
    """The most bytes that this process had resident."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main(argv: list[str]) -> int:
    """Run one of them."""
    run = CONTENDERS[argv[0]](Path(argv[1]), Path(argv[2]))
    idle = _peak()
    began, cpu = time.perf_counter(), time.process_time()
    pairs = run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = _peak()
    print(json.dumps({"seconds": seconds, "cpu_s": cpu, "idle": idle, "peak": peak, "pairs": pairs}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
