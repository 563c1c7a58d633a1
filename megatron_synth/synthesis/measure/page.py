"""The figures of a corpus and samples beside their parents, as one HTML file without network and script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import Markup

from megatron_synth.core.html import document, html, table
from megatron_synth.core.log import visible
from megatron_synth.synthesis.measure.corpus import HEAD, CorpusFigures, TextFigures
from megatron_synth.synthesis.measure.overlap import NGRAM, SHINGLE, THRESHOLD
from megatron_synth.synthesis.measure.statistics import WINDOW

_STYLE = """
.pair { display:grid; grid-template-columns:1fr 1fr; gap:14px; margin:14px 0 26px; }
.pair > div { background:var(--panel); border-radius:8px; padding:12px 14px; min-width:0; }
.pair h4 { margin:0 0 6px; font-size:13px; color:var(--gray); font-weight:600; }
.pair pre { margin:0; white-space:pre-wrap; overflow-wrap:anywhere; font:14px/1.5 inherit; }
@media (max-width: 700px) { .pair { grid-template-columns:1fr; } }
"""
_LONGEST = 4000  # characters of a sample that are shown


@dataclass(frozen=True)
class Sample:
    """An answer to show. reason: why it was rejected; None if it was kept."""

    kind: str
    parents: tuple[str, ...]
    text: str
    reason: str | None


def render(
    title: str,
    figures: CorpusFigures,
    samples: Sequence[Sample],
    *,
    account: Mapping[str, int] | None = None,
    made_by: str = "",
) -> str:
    """The page.

    Args:
        title: the corpus.
        figures: of `measure_corpus`.
        samples: answers to show, kept and rejected, in the order of the page.
        account: how many answers were kept and rejected, by reason.
        made_by: program and commit, for the foot.
    """
    foot = f"Made {datetime.now(UTC).date().isoformat()}" + (f" with {made_by}." if made_by else ".")
    parts = [
        html("<header><h1>{}</h1>{}</header>", title, _tiles(figures)),
        _account(account) if account else "",
        _beside(figures),
        _unigrams(figures),
        _novelty(figures),
        _overlap(figures),
        Markup('<h2 id="samples">Samples beside their parents</h2>') if samples else "",
        *map(_sample, samples),
        html('<p class="muted">{}</p>', foot),
    ]
    return document(title, parts, _STYLE)


def _tiles(figures: CorpusFigures) -> Markup:
    redundancy = figures.redundancy
    tiles = [
        (f"{figures.synthetic.lengths.texts:,}", "documents"),
        (f"{figures.synthetic.words:,}", "words"),
        (f"{figures.kl:.3f}", "nats from natural unigrams"),
        (_percent(redundancy.near / max(redundancy.texts, 1)), "documents that nearly stand there before"),
    ]
    inner = (html('<div class="tile"><b>{}</b><span>{}</span></div>', value, what) for value, what in tiles)
    return html('<div class="tiles">{}</div>', Markup("").join(inner))


def _account(account: Mapping[str, int]) -> Markup:
    total = sum(account.values())
    rows = [(name, f"{count:,}", _percent(count / total) if total else "n/a") for name, count in account.items()]
    return html('<h2 id="account">Answers</h2>{}', table(("", "answers", "share"), rows))


def _beside(figures: CorpusFigures) -> Markup:
    cells = [(name, read(figures.synthetic), read(figures.natural)) for name, read in _FIGURES.items()]
    note = f"Type-token: different words in windows of {WINDOW:,}. Tail: words beyond the {HEAD:,} most frequent natural ones."
    return html('<h2 id="text">Text</h2>{}<p class="muted">{}</p>', table(("", "synthetic", "natural"), cells), note)


_FIGURES: dict[str, Callable[[TextFigures], str]] = {
    "documents": lambda one: f"{one.lengths.texts:,}",
    "words": lambda one: f"{one.words:,}",
    "different words": lambda one: f"{one.types:,}",
    "words per document, mean": lambda one: f"{one.lengths.mean:.1f}",
    "p10, median, p90": lambda one: f"{one.lengths.p10:.0f}, {one.lengths.median:.0f}, {one.lengths.p90:.0f}",
    "longest": lambda one: f"{one.lengths.longest:,}",
    "type-token ratio": lambda one: _number(one.type_token),
    "compression ratio": lambda one: _number(one.compression),
    "tail": lambda one: _percent(one.tail),
}


def _unigrams(figures: CorpusFigures) -> Markup:
    rows = [(*_word(more), *_word(less)) for more, less in zip(figures.more, figures.less, strict=True)]
    text = (
        f"KL(synthetic || natural) is {figures.kl:.4f} nats, KL(natural || synthetic) {figures.kl_reverse:.4f}, each word "
        "counted once more than it occurs. Below: the words that add most to each."
    )
    heads = ("too often", "nats", "too rarely", "nats")
    return html('<h2 id="unigrams">Unigrams</h2><p>{}</p>{}', text, table(heads, rows))


def _word(part: tuple[str, float]) -> tuple[str, str]:
    return visible(part[0]), f"{part[1]:.4f}"


def _novelty(figures: CorpusFigures) -> Markup:
    if not figures.novelty:
        return Markup("")
    sizes = sorted({size for shares in figures.novelty.values() for size in shares})
    rows = [
        (kind, f"{figures.kinds[kind]:,}", *(_percent(shares[size]) if size in shares else "n/a" for size in sizes))
        for kind, shares in figures.novelty.items()
    ]
    heads = ("kind", "documents", *(f"new {size}-grams" for size in sizes))
    note = "Share of a document's n-grams of words that none of its parents has, on average."
    return html('<h2 id="novelty">Novelty</h2><p class="muted">{}</p>{}', note, table(heads, rows))


def _overlap(figures: CorpusFigures) -> Markup:
    redundancy = figures.redundancy
    text = (
        f"Of {redundancy.texts:,} documents {redundancy.exact:,} stand there before word for word, and {redundancy.near:,} "
        f"word for word or nearly (Jaccard similarity of {SHINGLE}-grams of at least {THRESHOLD}, estimated)."
    )
    rows = [(one.domain, f"{one.texts:,}", f"{one.any:,}", f"{one.half:,}") for one in figures.contamination]
    heads = ("validation domain", "documents", f"any {NGRAM}-gram seen", "half of them seen")
    shown = table(heads, rows) if rows else html('<p class="muted">{}</p>', "No validation domain was given.")
    return html('<h2 id="overlap">Duplicates and contamination</h2><p>{}</p>{}', text, shown)


def _sample(sample: Sample) -> Markup:
    verdict = "kept" if sample.reason is None else html('<span class="warn">{}</span>', sample.reason)
    parent = _shown("\n\n".join(sample.parents))
    return html(
        '<div class="pair"><div><h4>parent</h4><pre>{}</pre></div><div><h4>{}, {}</h4><pre>{}</pre></div></div>',
        parent,
        sample.kind,
        verdict,
        _shown(sample.text),
    )


def _shown(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else text[:_LONGEST] + " [...]")


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
