"""Raw answers on disk: what a kill, a full disk and a damaged file do to them."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.answers import index, parts
from megatron_synth.synthesis.answers.index import KeyIndex
from megatron_synth.synthesis.answers.parts import Answer, Answers, keys_of, lines

BROKEN = "\ufffd" * 3


def key(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def entry(number: int, text: str = "täxt \ud800"):
    return key(number), [f"parent {number}"], number, 0, Answer(f"{text} {number}", "stop", 10, number, 2, 0.5)


def filled(folder, count: int = 10) -> Answers:
    answers = Answers(folder)
    for number in range(count):
        answers.add([entry(number)])
    answers.close()
    return answers


def test_keys_are_found_again_across_merges(monkeypatch):
    monkeypatch.setattr(index, "NEW_KEYS", 7)
    found = KeyIndex()
    for number in range(100):
        found.add(key(number), (number % 3, number))
        assert len(found) == number + 1
    assert all(found.find(key(number)) == (number % 3, number) for number in range(100))
    assert found.find(key(100)) is None
    # two keys whose first halves are equal
    found.add(key(0)[:16] + "0" * 16, (9, 9))
    for number in range(101, 110):
        found.add(key(number), (0, number))
    assert found.find(key(0)) == (0, 0)
    assert found.find(key(0)[:16] + "0" * 16) == (9, 9)


def test_answers_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    filled(tmp_path)
    assert len(list(tmp_path.glob("part-*.jsonl"))) > 2
    again = Answers(tmp_path)
    assert len(again) == 10
    for number in range(10):
        line = again.read(key(number))
        assert line is not None
        assert line["text"] == f"täxt {BROKEN} {number}"
        assert (line["parents"], line["tokens_in"], line["tokens_out"]) == ([f"parent {number}"], 10, number)
    assert again.read(key(11)) is None
    again.close()


def test_a_key_is_kept_once(tmp_path):
    answers = filled(tmp_path, 3)
    answers.add([entry(1, "other"), entry(3), entry(3, "other")])
    answers.close()
    assert [line["text"] for line in lines(tmp_path)] == [f"täxt {BROKEN} {number}" for number in range(4)]


def test_a_torn_last_line_is_cut_at_every_byte(tmp_path):
    filled(tmp_path, 3)
    part = tmp_path / "part-00000.jsonl"
    whole = part.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for end in range(second, len(whole)):
        part.write_bytes(whole[:end])
        assert len(list(keys_of(tmp_path))) == 2  # whoever only looks changes nothing
        assert part.stat().st_size == end
        answers = Answers(tmp_path)
        assert len(answers) == 2
        answers.add([entry(2)])
        answers.close()
        assert part.read_bytes() == whole


@pytest.mark.parametrize("short", [False, True], ids=["refused", "half-written"])
def test_a_full_disk_loses_nothing_that_was_kept(tmp_path, monkeypatch, short):
    answers = filled(tmp_path, 3)
    before = (tmp_path / "part-00000.jsonl").read_bytes()
    answers.add([entry(3)])
    real = os.write

    def full(descriptor, data):
        if short:
            return real(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match=r"part-00000.jsonl: No space left on device; 4 answers are kept; make room"):
            answers.add([entry(4)])
    assert key(4) not in answers
    answers.add([entry(5)])
    answers.close()
    content = (tmp_path / "part-00000.jsonl").read_bytes()
    assert content.startswith(before)
    assert [line["chunk"] for line in lines(tmp_path)] == [0, 1, 2, 3, 5]


def test_damage_is_told_with_its_place(tmp_path):
    filled(tmp_path, 3)
    part = tmp_path / "part-00000.jsonl"
    whole = part.read_bytes()
    first = whole.index(b"\n") + 1
    part.write_bytes(whole[:first] + b'{"kex' + whole[first + 5 :])
    with pytest.raises(UserError, match=f"part-00000.jsonl, byte {first}: damaged"):
        Answers(tmp_path)
    part.write_bytes(whole + whole[:first])
    with pytest.raises(UserError, match="is there twice"):
        Answers(tmp_path)
    part.write_bytes(whole.replace(b'"tokens_in":10', b'"tokens_in":-1', 1))
    answers = Answers(tmp_path)
    with pytest.raises(UserError, match=r"byte 0: damaged: tokens_in"):
        answers.read(key(0))
    answers.close()
