"""The built-in corpus: the same text every time, splits that share nothing, and answers that the source gives."""

import ast
import inspect
import lzma
import platform
import re
from fractions import Fraction

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing import builtin_corpus
from megatron_synth.data.preparing.readers.documents import is_held_out
from tests.golden import corpus as maker
from tests.golden import corpus_questions

HOLDOUT = Fraction(1, 30)


@pytest.fixture(scope="module")
def corpus():
    return {name: list(builtin_corpus.documents(name)) for name in ("natural", "qa", "unseen")}


def test_the_shipped_text_is_what_was_made_of_the_standard_library(corpus):
    """On the version of Python that it was made of; everywhere else the digest answers for it."""
    if platform.python_version() != maker.PYTHON:
        pytest.skip(f"the text is that of Python {maker.PYTHON}")
    for name, found in corpus.items():
        assert list(maker.documents(name)) == found


def test_a_file_that_is_not_the_corpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin_corpus, "FILE", tmp_path / "corpus.jsonl.xz")
    for content, message in (
        (None, "No such file"),
        (b"not compressed", "cannot be decompressed"),
        (lzma.compress(b'["natural", "a", "text"]\n'), "not the built-in corpus"),
    ):
        if content is not None:
            builtin_corpus.FILE.write_bytes(content)
        builtin_corpus._content.cache_clear()
        with pytest.raises(UserError, match=message):
            list(builtin_corpus.documents("natural"))
    builtin_corpus._content.cache_clear()


def test_there_is_enough_text_and_none_twice(corpus):
    for found in corpus.values():
        texts = [text for _, text in found]
        assert len(set(texts)) == len(texts)
        assert all(text.strip() for text in texts)
        for text in texts:
            text.encode()
    sizes = {name: sum(len(text.encode()) for _, text in found) for name, found in corpus.items()}
    assert sizes["natural"] > 5e6 and sizes["qa"] > 1e6 and sizes["unseen"] > 5e5
    assert sum(sizes.values()) < 20e6, "the quickstart would take too long"


def test_the_unseen_domain_is_in_no_other_source(corpus):
    unseen = {key.split(".")[0] for key, _ in corpus["unseen"]}
    assert unseen == set(maker.UNSEEN)
    for name in ("natural", "qa"):
        assert not unseen & {key.split(".")[0] for key, _ in corpus[name]}
        assert not {text for _, text in corpus["unseen"]} & {text for _, text in corpus[name]}


def test_a_held_out_module_is_held_out_of_both_sources(corpus):
    held = {name: {key for key, _ in corpus[name] if is_held_out(key, HOLDOUT)} for name in ("natural", "qa")}
    assert held["qa"] and held["qa"] <= held["natural"]
    for name, keys in held.items():
        trained = {key for key, _ in corpus[name] if not is_held_out(key, HOLDOUT)}
        assert not keys & trained
        share = sum(len(text) for key, text in corpus[name] if key in keys) / sum(len(text) for _, text in corpus[name])
        assert 0.005 < share < 0.1


def test_no_tests_and_nothing_that_distributions_split_off(corpus):
    for found in corpus.values():
        parts = {part for key, _ in found if not key.startswith(maker.TOPICS) for part in key.split(".")}
        assert not parts & {"test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "distutils", "site-packages"}


def test_natural_holds_sources_docstrings_and_topics(corpus):
    import json
    import textwrap

    texts = {text for _, text in corpus["natural"]}
    if platform.python_version() == maker.PYTHON:
        assert inspect.getsource(textwrap) in texts
    assert any(text.startswith("json.loads(s, *, cls=None") and json.loads.__doc__.strip()[:40] in text for text in texts)
    assert any(key == "pydoc_data.topics.lambda" for key, _ in corpus["natural"])


MODULE = '''
"""Sums numbers. Nothing else."""

def add(a, b=2, *, strict, scale=1.5, **rest):
    """Add two numbers

    The result is scaled. Wrapped
    lines are joined.
    """

class Adder(Base):
    """Adds."""

    def run(self, values):
        """Run it."""

    def _hide(self):
        """Hidden from lists."""

def silent():
    def local():
        """Of no interest."""
'''


def test_questions_are_answered_from_docstrings_and_signatures():
    entries = list(corpus_questions.entries("sums", ast.parse(MODULE)))
    names = [entry.qualified_name for entry in entries]
    assert names == ["sums", "sums.add", "sums.Adder", "sums.Adder.run", "sums.Adder._hide", "sums.silent"]
    pairs = {}
    for document in corpus_questions.documents("sums", entries):
        for block in document.strip().split("\n\n"):
            question, answer = block.split("\nAnswer: ")
            pairs[question.removeprefix("Question: ")] = answer.strip()

    def answer(templates, name):
        (found,) = [pairs[template.format(name=name)] for template in templates if template.format(name=name) in pairs]
        return found

    assert answer(corpus_questions.MODULE, "sums") == "Sums numbers."
    assert answer(corpus_questions.MORE, "sums") == "Nothing else."
    assert answer(corpus_questions.WHAT, "sums.add") == "Add two numbers. It is a function of sums."
    assert answer(corpus_questions.MORE, "sums.add") == "The result is scaled. Wrapped lines are joined."
    assert answer(corpus_questions.SIGNATURE, "sums.add") == "sums.add(a, b=2, *, strict, scale=1.5, **rest)"
    expected = "It needs a and strict. It also accepts b (default 2) and scale (default 1.5)."
    assert answer(corpus_questions.ARGUMENTS, "sums.add") == expected
    assert answer(corpus_questions.METHODS, "sums.Adder") == "sums.Adder offers run."
    assert not any("silent" in question for question in pairs), "no docstring, no question"


def test_wordings_vary(corpus):
    text = "\n".join(text for _, text in corpus["qa"])
    for templates in (
        corpus_questions.WHAT,
        corpus_questions.MORE,
        corpus_questions.SIGNATURE,
        corpus_questions.ARGUMENTS,
        corpus_questions.METHODS,
    ):
        patterns = ["Question: " + re.escape(template).replace(r"\{name\}", r"\S+") for template in templates]
        counts = [len(re.findall(pattern, text)) for pattern in patterns]
        assert min(counts) > 0.5 * sum(counts) / len(counts), dict(zip(templates, counts, strict=True))


def test_documents_hold_several_pairs_of_one_module(corpus):
    pairs = [text.count("Question: ") for _, text in corpus["qa"]]
    assert max(pairs) == corpus_questions.PAIRS_PER_DOCUMENT
    assert sum(pairs) / len(pairs) > 4
