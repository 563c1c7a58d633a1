"""What tests of `prepare` share: texts, and what came of them."""

import json

import numpy as np

from megatron_synth.data.shards.source import open_source
from megatron_synth.data.tokenizer import load_tokenizer

EOD = "<|endoftext|>"


TEXTS = [f"Document {n}: the {n * n} quick foxes\njump over {'naïve ' * (n % 7)}dogs. 狐 {n}" for n in range(60)]


TEXTS[5] = f"A text that says {EOD} in the middle."


def jsonl(path, texts=TEXTS, key="text"):
    path.write_text("".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)), encoding="utf-8")
    return path


def write_texts(folder, *, files=4, lines=2000, words=60):
    """Files `0.jsonl` and on in a new folder, each longer than the one before, of made-up words: some megabytes."""
    if folder.exists():
        return folder
    folder.mkdir()
    for number in range(files):
        texts = (
            " ".join(f"w{(number * 7919 + line * 31 + word * word) % 5003}" for word in range(words))
            for line in range(lines * (number + 1))
        )
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(content, encoding="utf-8")
    return folder


def stored_texts(folder, tokenizer_path):
    """The documents of a prepared source, decoded."""
    source, tokenizer = open_source(folder, "s"), load_tokenizer(tokenizer_path, EOD)
    tokens = np.concatenate([shard.tokens for shard in source._shards])
    ends = np.flatnonzero(tokens == tokenizer.eod_id)
    assert ends.size == source.num_documents and ends[-1] == tokens.size - 1
    starts = np.concatenate([[0], ends[:-1] + 1])
    assert starts.tolist() == np.concatenate([[0], np.cumsum(lengths_of(source))[:-1]]).tolist()
    return [tokenizer.decode(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]


def lengths_of(source):
    return [
        length
        for shard in source._shards
        for length in np.diff([*shard.document_starts(0, shard.num_tokens).tolist(), shard.num_tokens])
    ]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SHUFFLED_AND_PACKED = {"shuffle": {"seed": 5}, "packing": {"sequence_length": 64}}
