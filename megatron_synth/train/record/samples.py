"""samples.jsonl of a run: texts that `megatron-synth generate` had its model write, newest last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.core.files import append_line
from megatron_synth.core.log import one_line
from megatron_synth.core.records import OPEN, Amount, Count, Reader

FILE = "samples.jsonl"
SHOWN = 4
"""Texts that a summary shows."""
SHOWN_CHARACTERS = 200
"""Of each of them."""
_Text = Annotated[str, Field(strict=True)]


@with_config(OPEN)
class Sample(TypedDict):
    """A text, and what it was made with. time: of the command, the same for all of its texts. average: of the weights."""

    time: _Text
    step: Count
    average: bool
    prompt: _Text
    text: _Text
    finish: _Text
    tokens: Count | None
    seed: Count
    temperature: Amount
    top_p: Amount
    top_k: Count


SAMPLES: Reader[Sample] = Reader(Sample, "remove the line, or the file: `megatron-synth generate` writes new ones")


def add(run: Path, samples: list[Sample]) -> None:
    """Append texts to the samples.jsonl of a run directory."""
    append_line(run / FILE, "\n".join(json.dumps(sample) for sample in samples))


def newest(run: Path) -> list[Sample]:
    """The texts of the last command; empty if there are none.

    Raises:
        UserError: the file is damaged.
    """
    found = SAMPLES.read_lines(run / FILE)
    return [sample for sample in found if sample["time"] == found[-1]["time"]]


def excerpt(run: Path) -> list[str]:
    """The newest texts for a summary: a line each, beginning with its prompt, control characters written out."""
    found = newest(run)
    if not found:
        return []
    shown, of = found[:SHOWN], "the average of the weights" if found[0]["average"] else "the weights"
    more = f", {len(shown)} of {len(found)}" if len(found) > len(shown) else ""
    return [f"what {of} of step {found[0]['step']:,} write{more}:", *map(_line, shown)]


def _line(sample: Sample) -> str:
    prompt, text = one_line(sample["prompt"]), one_line(sample["text"])
    if len(prompt) > SHOWN_CHARACTERS // 2:
        prompt = f"...{prompt[-SHOWN_CHARACTERS // 2 :]}"
    room = SHOWN_CHARACTERS - len(prompt)
    return f"  | {prompt} >> {text if len(text) <= room else text[:room] + '...'}"
