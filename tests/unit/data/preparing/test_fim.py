"""Fill in the middle: which documents are cut, and that nothing of them is lost."""

import json
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import FimConfig
from megatron_synth.data.preparing.fim import Cutter
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.shards.source import open_source
from megatron_synth.data.tokenizer import load_tokenizer
from tests.unit.data.preparing.support import EOD, TEXTS, stored_texts, tree

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture(scope="session")
def fim_tokenizer(tokenizer_path, tmp_path_factory):
    backend = Backend.from_file(str(tokenizer_path))
    backend.add_special_tokens(list(MARKS))
    path = tmp_path_factory.mktemp("fim") / "tokenizer.json"
    backend.save(str(path))
    return path


def documents_of(folder):
    source = open_source(folder, "s")
    for shard in source._shards:
        edges = [*shard.document_starts(0, shard.num_tokens).tolist(), shard.num_tokens]
        for first, last in pairwise(edges):
            yield shard.tokens[first:last].tolist()


def restored(tokens, tokenizer):
    """(text, form) of a document; the form is None where it was not cut."""
    prefix_id, suffix_id, middle_id = (tokenizer.backend.token_to_id(mark) for mark in MARKS)
    assert tokens[-1] == tokenizer.eod_id and tokenizer.eod_id not in tokens[:-1]
    body = tokens[:-1]
    if prefix_id not in body:
        assert suffix_id not in body and middle_id not in body
        return tokenizer.decode(body), None
    assert body[0] == prefix_id and [body.count(one) for one in (prefix_id, suffix_id, middle_id)] == [1, 1, 1]
    suffix_at, middle_at = body.index(suffix_id), body.index(middle_id)
    assert suffix_at < middle_at
    if suffix_at == 1:
        return tokenizer.decode(body[middle_at + 1 :]) + tokenizer.decode(body[2:middle_at]), "spm"
    prefix, suffix, middle = body[1:suffix_at], body[suffix_at + 1 : middle_at], body[middle_at + 1 :]
    return tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix), "psm"


@pytest.mark.parametrize("by", ["characters", "tokens"])
def test_the_text_of_cut_documents_is_that_of_the_input(make, tmp_path, fim_tokenizer, by):
    source = {"fim": {"share": "1/2", "by": by, "seed": 3}, "holdout": "1/5"}
    config = make(source, tokenizer={"path": str(fim_tokenizer), "eod": EOD})
    prepare(config)
    tokenizer = load_tokenizer(fim_tokenizer, EOD)
    found = [restored(tokens, tokenizer) for tokens in documents_of(tmp_path / "out" / "web")]
    held_out = stored_texts(tmp_path / "out" / "web-valid", fim_tokenizer)
    # characters of several bytes are whole on either side of a cut by characters
    texts = [text for text, _ in found]
    if by == "characters":
        assert sorted(texts + held_out) == sorted(TEXTS)
    else:
        assert len(texts) + len(held_out) == len(TEXTS) and len(set(texts) & set(TEXTS)) > len(texts) / 2
    cut = [form for _, form in found if form is not None]
    assert abs(len(cut) - len(found) / 2) <= 1 + len(found) % 64 / 4
    assert {"psm", "spm"} == set(cut)
    mark_ids = {tokenizer.backend.token_to_id(mark) for mark in MARKS}
    assert not any(mark_ids & set(tokens) for tokens in documents_of(tmp_path / "out" / "web-valid"))
    # the same again, to the byte, and not with another seed
    again = config.model_copy(update={"output": str(tmp_path / "again")})
    prepare(again)
    assert tree(tmp_path / "again" / "web")["shard-00000.bin"] == tree(tmp_path / "out" / "web")["shard-00000.bin"]
    source["fim"]["seed"] = 4
    prepare(make(source, tokenizer={"path": str(fim_tokenizer), "eod": EOD}), force=True)
    assert tree(tmp_path / "again" / "web")["shard-00000.bin"] != tree(tmp_path / "out" / "web")["shard-00000.bin"]


@pytest.mark.parametrize(("share", "spm"), [("1/2", "1/2"), ("0.337", "0"), ("1", "1/3"), ("9/10", "1"), ("0", "1/2")])
def test_shares_are_exact_in_every_block(share, spm):
    cutter = Cutter(FimConfig(share=share, spm=spm), "web", 5)
    cuts = [cutter.next() for _ in range(64 * 40)]
    of_blocks = [sum(cut is not None for cut in cuts[at : at + 64]) for at in range(0, len(cuts), 64)]
    assert all(abs(found - 64 * Fraction(share)) < 1 for found in of_blocks)
    assert np.all(np.abs(np.cumsum(of_blocks) - 64 * np.arange(1, 41) * float(Fraction(share))) < 1)
    chosen = [cut for cut in cuts if cut is not None]
    assert abs(sum(cut.spm for cut in chosen) - len(chosen) * Fraction(spm)) < 1
    # every place of a document of 9 characters is cut at about as often, the ends too
    if len(chosen) > 2000:
        ends = np.array([cut.at(9) for cut in chosen])
        assert np.bincount(ends.ravel(), minlength=10).min() > 0.7 * ends.size / 10
        assert np.all(ends[:, 0] <= ends[:, 1])


def test_text_that_spells_the_tokens_is_text(make, tmp_path, fim_tokenizer):
    path = tmp_path / "web.jsonl"
    text = "a <|fim_prefix|> b <|fim_middle|> c"
    path.write_text(json.dumps({"text": text}) + "\n")
    prepare(make({"input": str(path), "fim": {"share": 1}}, tokenizer={"path": str(fim_tokenizer), "eod": EOD}))
    tokenizer = load_tokenizer(fim_tokenizer, EOD)
    (document,) = documents_of(tmp_path / "out" / "web")
    assert restored(document, tokenizer)[0] == text


def test_a_tokenizer_without_the_tokens_is_refused_before_any_work(make, tokenizer_path, fim_tokenizer):
    with pytest.raises(UserError, match=r"sources.web.fim.prefix: .* has no special token '<\|fim_prefix\|>'"):
        prepare(make({"fim": {"share": "1/2"}}))
    with pytest.raises(UserError, match=r"sources.web.fim.suffix: .*: <\|fim_middle\|>, <\|fim_prefix\|>, <\|fim_suffix\|>"):
        source = {"fim": {"share": "1/2", "suffix": "<fim_suffix>"}}
        prepare(make(source, tokenizer={"path": str(fim_tokenizer), "eod": EOD}))
    with pytest.raises(ValueError, match="a tokenizer that is trained"):
        make({"fim": {"share": "1/2"}}, tokenizer={"train": {"vocab_size": 300}})
    with pytest.raises(ValueError, match="text for validation is not cut"):
        make({"fim": {"share": "1/2"}, "split": "validation"})
    with pytest.raises(ValueError, match="a token each"):
        make({"fim": {"share": "1/2", "suffix": "<|fim_prefix|>"}})
