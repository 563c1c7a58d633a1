"""Figures of text that a study has made: what rounds do to loss and unigrams, and what each arm's text was worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_synth.core.log import compact, human
from megatron_synth.study.report.analysis import LEVEL
from megatron_synth.study.report.figures.drawing import Drawn, Look, figure_size, panel_title, panels_of, render_figure
from megatron_synth.study.report.generation.analysis import ArmCost, Generation, Loop, RoundText
from megatron_synth.train.record.figures.plot import GREY, INK, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HUES = ("#c2503f", "#3d7cc9", "#2f9e6e", "#d9822b", "#a35bb5", "#3fa3b5")


def draw_generation(found: Generation, baseline: str, style: dict[str, Look]) -> list[Drawn]:
    """Every figure that the runs allow."""
    cells = list(dict.fromkeys((loop.size, loop.tokens) for loop in found.loops))
    figures = [_rounds([loop for loop in found.loops if (loop.size, loop.tokens) == cell], len(cells)) for cell in cells]
    loops = {row.arm for loop in found.loops for row in loop.rows}
    arms = [one for one in found.costs if one.arm not in loops and one.equal_tokens is not None]
    for cell in dict.fromkeys((one.size, one.tokens) for one in arms):
        figures.append(_worth([one for one in arms if (one.size, one.tokens) == cell], baseline, style))
    return figures


def _rounds(loops: Sequence[Loop], cells: int) -> Drawn:
    """Loss, lost tail and divergence by round."""
    first = loops[0]
    from matplotlib.ticker import MaxNLocator

    known = [loop for loop in loops if all(text is not None for text in loop.text)]

    def draw(figure: Figure) -> None:
        axes = panels_of(figure, 3 if known else 1)
        _loss_panel(axes[0], loops)
        if known:
            _text_panel(axes[1], known, loops, "Tail tokens that are never written", "lost", "lost_by_chance", 100.0)
            axes[1].set_ylabel("% of the natural tail's tokens", color=GREY, fontsize=9)
            _text_panel(axes[2], known, loops, "Divergence of unigrams", "kl_reverse", "kl_reverse_by_chance", 1.0)
            axes[2].set_ylabel("KL(natural || text), nats", color=GREY, fontsize=9)
        for ax in axes:
            ax.set_xlabel("round", color=GREY)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))

    where = f"{first.size}, {compact(first.tokens)} tokens"
    caption = (
        f"At {where}. Each round trains on what the model of the round before has written; round 0 is real text alone. Points: "
        "runs, one for each seed; lines: means. Dashed: a draw of as many tokens from the natural unigrams."
    )
    told = "; ".join(f"{loop.name}: {' '.join(f'{value:.3f}' for value in _means(loop))}" for loop in loops)
    name = "rounds" if cells == 1 else f"rounds-{first.size}-{compact(first.tokens)}"
    head = ("loop", "round", "mean loss", "lost tail", "lost tail by chance", "KL", "KL by chance")
    question = "Does the loss rise when models train on what models wrote?"
    title, told = "Round by round", f"Mean loss by round: {told}"
    data = [head, *_numbers(loops)]
    return render_figure(name, title, caption, figure_size(3), draw, told, question=question, data=data)


def _numbers(loops: Sequence[Loop]) -> Iterator[tuple[object, ...]]:
    """The figure's numbers; round 0 has no text of a model's."""
    for loop in loops:
        for number, (loss, text) in enumerate(zip(_means(loop), (None, *loop.text), strict=True)):
            of_text = (
                ("",) * 4 if text is None else (text.lost, text.lost_by_chance, text.kl_reverse, text.kl_reverse_by_chance)
            )
            yield loop.name, number, loss, *of_text


def _means(loop: Loop) -> list[float]:
    means: list[float] = np.exp(np.log(loop.losses).mean(axis=0)).tolist()
    return means


def _loss_panel(ax: Axes, loops: Sequence[Loop]) -> None:
    panel_title(ax, "Loss on natural validation text")
    labels = []
    for number, loop in enumerate(loops):
        color, means = _HUES[number % len(_HUES)], _means(loop)
        rounds = np.arange(len(means))
        for line in loop.losses:
            ax.plot(rounds, line, "o", color=color, markersize=3.2, alpha=0.55, markeredgewidth=0)
        ax.plot(rounds, means, "-", color=color, linewidth=1.8)
        labels.append((means[-1], loop.name, color))
    label_ends(ax, labels)


def _text_panel(
    ax: Axes, known: Sequence[Loop], loops: Sequence[Loop], title: str, value: str, chance: str, scale: float
) -> None:
    panel_title(ax, title)
    labels = []
    expected: list[tuple[int, float]] = []
    for loop in known:
        color = _HUES[list(loops).index(loop) % len(_HUES)]
        texts: list[RoundText] = [text for text in loop.text if text is not None]
        rounds = np.arange(1, len(texts) + 1)
        values = [scale * getattr(text, value) for text in texts]
        ax.plot(rounds, values, "o-", color=color, linewidth=1.8, markersize=4)
        expected += [(number, scale * getattr(text, chance)) for number, text in zip(rounds.tolist(), texts, strict=True)]
        labels.append((values[-1], loop.name, color))
    by_round = [float(np.mean([value for at, value in expected if at == number])) for number in sorted(dict(expected))]
    ax.plot(sorted(dict(expected)), by_round, color=GREY, linewidth=1.2, linestyle=(0, (4, 2.5)))
    label_ends(ax, labels)


def _worth(arms: Sequence[ArmCost], baseline: str, style: dict[str, Look]) -> Drawn:
    """Each arm against the baseline at equal tokens and at equal compute."""
    first = arms[0]
    ordered = sorted(arms, key=lambda one: -(one.equal_tokens.value if one.equal_tokens is not None else 0.0))

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for place, one in enumerate(ordered):
            assert one.equal_tokens is not None
            color = style[one.arm].color
            low, high = one.equal_tokens.interval
            ax.plot([100 * low, 100 * high], [place, place], color=color, linewidth=2.2, solid_capstyle="round")
            ax.plot([100 * one.equal_tokens.value], [place], "o", color=color, markersize=6)
            if one.equal_compute is not None:
                ax.plot([100 * one.equal_compute.value], [place], "D", color=color, markersize=4.5, fillstyle="none")
            cost = "" if one.generation_flops is None else f"{one.generation_flops / one.train_flops:.2f} x training"
            ax.text(1.01, place, cost, transform=ax.get_yaxis_transform(), va="center", fontsize=9, color=GREY)
        ax.axvline(0, color=GREY, linewidth=0.9)
        ax.set_yticks(range(len(ordered)), [one.arm for one in ordered])
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(f"loss against {baseline}, %; lower is better", color=GREY)

    told = "; ".join(f"{one.arm} {100 * one.equal_tokens.value:+.1f} %" for one in ordered if one.equal_tokens is not None)
    caption = (
        f"At size {first.size} and {human(first.tokens)} tokens. Points: at equal tokens, with the {LEVEL:.0f} % interval of "
        "the noise floor; diamonds: against as much more real text as the FLOPs of generation buy, where that was measured. "
        "On the right: FLOPs of generation."
    )
    size = (11.5, 1.3 + 0.36 * len(ordered))
    name = f"worth-{first.size}-{compact(first.tokens)}"
    head = ("arm", "equal tokens", "low", "high", "equal compute", "generation FLOPs", "training FLOPs")
    data = [
        (
            one.arm,
            one.equal_tokens.value,
            *one.equal_tokens.interval,
            "" if one.equal_compute is None else one.equal_compute.value,
            "" if one.generation_flops is None else one.generation_flops,
            one.train_flops,
        )
        for one in ordered
        if one.equal_tokens is not None
    ]
    question, title = "What was each kind of text worth, with what it cost?", "What each arm's text was worth"
    return render_figure(name, title, caption, size, draw, told, question=question, data=[head, *data])
