"""`synthesize plan`: what a file would ask, and what that would take, before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import duration, human, table
from megatron_synth.synthesis import licenses
from megatron_synth.synthesis.answers.index import KeyIndex
from megatron_synth.synthesis.answers.parts import LINES, keys_of
from megatron_synth.synthesis.setup import Counted, Setup


@dataclass(frozen=True)
class Rate:
    """Tokens that an H100 writes a second, of a model of so many parameters, as published."""

    parameters: float
    tokens_per_second: float
    model: str
    source: str


RATES = (
    Rate(1.7e9, 9220, "SmolLM2-1.7B", "datatrove's benchmark, vLLM"),
    Rate(4e9, 8086, "Qwen3-4B", "datatrove's benchmark, vLLM"),
    Rate(8e9, 6443, "Qwen3-8B", "datatrove's benchmark, vLLM"),
    Rate(32e9, 2078, "Qwen3-32B", "datatrove's benchmark, vLLM"),
    Rate(70e9, 310, "a 70B model", "REWIRE"),
)


@dataclass(frozen=True)
class Planned:
    """What a synthesis would ask. Tokens are counted for prompts and estimated for answers."""

    documents: int
    short: int
    """Documents that become no chunk."""
    chunks: int
    unasked: int
    """Chunks that become no request: equal to one before, or without keywords."""
    requests: int
    answered: int
    tokens_in: int
    tokens_out: int
    most_tokens_out: int
    tokens_cached: int
    study_tokens: int | None
    """Of the answers, by the tokenizer of the study: as many for each of the generator's as the parents have."""


def count(setup: Setup) -> Planned:
    """Read all parents and count, without the engine."""
    counted = Counted()
    known = _answered(setup)
    template, most = setup.template, setup.config.sampling.max_tokens
    requests = answered = tokens_in = text_tokens = study_tokens = 0
    tokens_out = 0.0
    for request in setup.requests(counted):
        requests += 1
        answered += request.key in known
        tokens_in += setup.prompt_tokens(request)
        expected = template.expected_output * (request.chunk.tokens if template.made_from == "text" else 1)
        tokens_out += min(expected, most)
        if setup.study_counter is not None:
            text_tokens += request.chunk.tokens
            study_tokens += setup.study_counter.count([request.chunk.text])[0]
    study = None if setup.study_counter is None else round(tokens_out * study_tokens / max(text_tokens, 1))
    cached = max(requests - 1, 0) * setup.constant_tokens()
    return Planned(
        documents=counted.documents,
        short=counted.skipped.short,
        chunks=counted.asking.chunks,
        unasked=counted.asking.repeated + counted.asking.without_keywords,
        requests=requests,
        answered=answered,
        tokens_in=tokens_in,
        tokens_out=round(tokens_out),
        most_tokens_out=requests * most,
        tokens_cached=cached,
        study_tokens=study,
    )


def _answered(setup: Setup) -> KeyIndex:
    index = KeyIndex()
    for key in keys_of(setup.answers):
        if key in index:
            raise UserError(f"{setup.answers}: the key {key} is there twice; {LINES.remedy}")
        index.add(key, (0, 0))
    return index


def rate_for(parameters: int) -> Rate:
    """The published rate of the model nearest in size, by the logarithm."""
    return min(RATES, key=lambda rate: abs(math.log(rate.parameters / parameters)))


def plan_text(setup: Setup, planned: Planned, gpus: int, price: float | None) -> str:
    """The plan in words and numbers."""
    config, generator, template = setup.config, setup.generator, setup.template
    about = "" if setup.counter.exact else "about "
    rows: list[tuple[str, ...]] = [
        ("", ""),
        ("template", f"{template.name} {template.version} ({template.digest[:12]}), {template.origin}"),
        ("generator", f"{generator.name}, {_parameters(generator.parameters)}, engine {config.engine.name}"),
        ("parents", f"{planned.documents:,} documents, of which {planned.short:,} are skipped: too short"),
        ("chunks", f"{planned.chunks:,}, of which {planned.unasked:,} are skipped: equal to another one, or without keywords"),
        ("requests", f"{planned.requests:,}, of which {planned.answered:,} are answered already"),
        ("prompt tokens", f"{about}{planned.tokens_in:,}, of which a prefix cache saves {about}{planned.tokens_cached:,}"),
        ("answer tokens", f"about {planned.tokens_out:,}, at most {planned.most_tokens_out:,}"),
    ]
    if planned.study_tokens is not None:
        rows.append(("", f"about {planned.study_tokens:,} of the study's tokenizer"))
    computed = planned.tokens_in + planned.tokens_out
    if generator.parameters is not None:
        rows.append(("FLOPs", f"about {2.0 * generator.parameters * computed:.2e}, without a prefix cache"))
    rows.append(_time(setup, planned, gpus, price))
    text = table(rows[1:], words=True)
    return f"{text}\n  license: {licenses.warning(generator.license)}"


def _time(setup: Setup, planned: Planned, gpus: int, price: float | None) -> tuple[str, str]:
    own, parameters = setup.config.generator.tokens_per_second, setup.generator.parameters
    if own is not None:
        rate, origin = own, "generator.tokens_per_second"
    elif parameters is not None and parameters >= RATES[0].parameters / 4:
        found = rate_for(parameters)
        rate, origin = found.tokens_per_second, f"{found.model} on an H100, {found.source}"
    else:
        return "time", "not known: set generator.tokens_per_second to what one device writes"
    left = planned.tokens_out * (1 - planned.answered / max(planned.requests, 1))
    seconds = left / rate / gpus
    devices = f"{gpus} device{'s' if gpus > 1 else ''}"
    cost = "" if price is None else f", {seconds / 3600 * gpus * price:,.2f} at {price:g} an hour and device"
    return "time", f"{duration(seconds)} on {devices} at {human(rate)} tokens/s each ({origin}){cost}"


def _parameters(parameters: int | None) -> str:
    return "parameters not known" if parameters is None else f"{human(parameters)} parameters"
