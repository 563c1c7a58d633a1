"""The corpora of a study as text: what they are expected to take (`plan`), and how far they are (`status`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_synth.core.log import human, scientific, table
from megatron_synth.study.execute.folder import STATES, Folder
from megatron_synth.study.plan.corpora import Corpus, corpora_of
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study

_FORWARD_FLOPS_PER_PARAMETER = 2


def corpora_text(study: Study, runs: Sequence[Run], folder: Folder, vocab_size: int | None = None) -> str:
    """One line for each generated source; empty for a study that makes no text.

    vocab_size: given, what is expected is told too, by `tokens` of the source.
    """
    corpora = corpora_of(runs)
    if not corpora:
        return ""
    of_source: dict[str, list[Corpus]] = {}
    for run in runs:
        for name, corpus in run.corpora.items():
            if corpus not in of_source.setdefault(name, []):
                of_source[name].append(corpus)
    heads = ["source", "text", "written by", "corpora"]
    if vocab_size is not None:
        heads += ["tokens, each", "FLOPs, all"]
    rows: list[tuple[str, ...]] = [(*heads, "state")]
    for name, members in of_source.items():
        first = members[0]
        row = [name, f"{first.template.name} {first.template.version}", _writer(first), str(len(members))]
        if vocab_size is not None:
            row += _expected(members, vocab_size)
        counted = Counter(folder.state(corpus) for corpus in members)
        rows.append((*row, ", ".join(f"{counted[state]} {state}" for state in STATES if counted[state])))
    sections = [f"{len(corpora)} corpora that the study makes\n{table(rows, words=True)}"]
    if vocab_size is not None and all(corpus.tokens is not None for corpus in corpora):
        known = [_flops(corpus, vocab_size) for corpus in corpora]
        flops = sum(value for value in known if value is not None)
        hours = "" if study.costs is None else f", {flops / study.costs.rate() / 3600:.3g} device-hours at the rate of training"
        sections.append(f"  written text alone, without prompts and what is rejected: {scientific(flops)} FLOPs{hours}")
    failed = [corpus for corpus in corpora if folder.state(corpus) == "failed"]
    for corpus in failed:
        sections.append(f"  {corpus.name}: {folder.describe_failure(corpus) or 'failed'}; {folder.log(corpus)}")
    return "\n".join(sections)


def _writer(corpus: Corpus) -> str:
    if corpus.generator is None:
        return corpus.settings.generator.model or "another model"
    against = "" if corpus.against is None else f" against {corpus.against.arm}, {corpus.against.size}"
    return f"{corpus.generator.arm}, {corpus.generator.size}{against}"


def _expected(members: Sequence[Corpus], vocab_size: int) -> list[str]:
    tokens = members[0].tokens
    flops = [_flops(corpus, vocab_size) for corpus in members]
    known = [value for value in flops if value is not None]
    return ["set `tokens`" if tokens is None else human(tokens), scientific(sum(known)) if len(known) == len(flops) else "n/a"]


def _flops(corpus: Corpus, vocab_size: int) -> float | None:
    """Of the tokens that are expected: 2 x parameters for each; None where one of the two is not known."""
    from megatron_synth.estimate.flops import count_parameters

    if corpus.tokens is None:
        return None
    if corpus.generator is None:
        given = corpus.settings.generator.parameters
        return None if given is None else float(_FORWARD_FLOPS_PER_PARAMETER * given * corpus.tokens)
    parameters = sum(count_parameters(run.config.model, vocab_size).total for run in corpus.writers)
    return float(_FORWARD_FLOPS_PER_PARAMETER * parameters * corpus.tokens)
