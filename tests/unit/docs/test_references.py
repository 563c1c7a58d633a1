"""Documents name what exists, and the check would notice if they did not."""

from __future__ import annotations

import pytest

from docs import references


def test_documents_name_what_exists() -> None:
    assert references.problems() == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `train/loop.py`", []),
        ("see\n`train/lop.py`", [(2, "no file train/lop.py")]),
        ("base: model/tiny-1m.yaml", []),
        ("runs/first/config.yaml", []),
        ("[laws](laws.md) and https://host/page.md", []),
        ("megatron_synth.train.loop", []),
        ("megatron_synth.train.loops", [(1, "no module megatron_synth.train.loops")]),
        ("`megatron-synth trian x.yaml`", [(1, "no verb trian")]),
        ("`tests/unit/docs/test_references.py::test_documents_name_what_exists`", []),
        (
            "`tests/unit/docs/test_references.py::test_documents`",
            [(1, "no test test_documents in tests/unit/docs/test_references.py")],
        ),
        ("`make quickstart` and `make quick`", [(1, "no target quick in the Makefile")]),
        ("```python\n# megatron_synth/nothing.py\n```", []),
    ],
)
def test_what_does_not_exist_is_found_with_its_line(text: str, found: list[tuple[int, str]]) -> None:
    assert list(references.missing(text, references.ROOT / "docs")) == found
