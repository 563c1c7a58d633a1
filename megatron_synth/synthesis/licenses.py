"""What licenses of generators say about text that their models write. A pointer to read, no advice of a lawyer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """terms: what to heed, in short; source: where it stands."""

    terms: str
    source: str


FREE = Terms("no condition on what the model writes", "the license has none")

LLAMA = (
    "a model trained on outputs and distributed must have `Llama` first in its name; what contains Llama itself must also show "
    "`Built with Llama`"
)

TERMS: dict[str, Terms] = {
    "apache-2.0": FREE,
    "mit": FREE,
    "bsd-3-clause": FREE,
    "llama2": Terms(
        "outputs may not be used to improve other large language models than Llama 2 and its derivatives",
        "Llama 2 Community License, 1.b.v",
    ),
    "llama3": Terms(
        "outputs may not be used to improve other large language models than Llama 3 and its derivatives",
        "Meta Llama 3 Community License, 1.b.v",
    ),
    "llama3.1": Terms(LLAMA, "Llama 3.1 Community License, 1.b.i"),
    "llama3.2": Terms(LLAMA, "Llama 3.2 Community License, 1.b.i"),
    "llama3.3": Terms(LLAMA, "Llama 3.3 Community License, 1.b.i"),
    "llama4": Terms(LLAMA, "Llama 4 Community License, 1.b.i"),
    "qwen": Terms(
        "a model trained on outputs and distributed must show `Built with Qwen` or `Improved using Qwen` in its documentation",
        "Qwen License Agreement, 4.b",
    ),
    "gemma": Terms(
        "a model trained on outputs to behave like Gemma is a Model Derivative: its terms and use policy pass on to it",
        "Gemma Terms of Use, 1.1(e) and 3.1",
    ),
}


def warning(license: str | None) -> str:
    """What a plan and a manifest say about a generator's license."""
    if license is None:
        return "the generator's license is not known: read its terms for outputs, and set generator.license"
    found = TERMS.get(license.lower())
    if found is None:
        return f"{license}: its terms for outputs are not known here; read them before you train on this text"
    return f"{license}: {found.terms} ({found.source}; read it)"
