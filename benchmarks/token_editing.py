"""`python -m benchmarks token-editing FOLDER`: how much of natural text a model is sure of, and how much editing changes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import EXIT_OK

THRESHOLDS = (0.999, 0.99, 0.9, 0.5)
LONGEST = 2000  # characters of a document


def main(argv: list[str]) -> int:
    """Print the shares of the tokens that are drawn anew and changed, by threshold."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks token-editing",
        description="Shares of the tokens of natural text that token editing draws anew and changes, by threshold.",
    )
    parser.add_argument("folder", type=Path, help="a Hugging Face folder with a causal model")
    parser.add_argument("--documents", type=count, default=40, help="of the built-in corpus, evenly taken (%(default)s)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    from megatron_synth.bench import tables
    from megatron_synth.core.log import say
    from megatron_synth.data.preparing import builtin_corpus
    from megatron_synth.synthesis.decoding.model import load
    from megatron_synth.synthesis.decoding.token_editing import edit

    head = tables.header("", [])
    head["command"] = " ".join(["python -m benchmarks token-editing", *argv])
    prior = load(options.folder, options.device)
    texts = [text[:LONGEST] for _, text in builtin_corpus.documents("natural")]
    step = max(len(texts) // options.documents, 1)
    chosen = [(str(number), texts[number]) for number in range(0, len(texts), step)][: options.documents]
    rows = [["p", "drawn anew", "changed", "texts changed", "tokens per CPU-second"]]
    total = 0
    for p in THRESHOLDS:
        start = time.process_time()
        found = edit(prior, chosen, p=p)
        seconds = time.process_time() - start
        total = sum(one.tokens for one in found)
        shares = [
            f"{100 * sum(values) / total:.2f} %" for values in zip(*((one.drawn, one.changed) for one in found), strict=True)
        ]
        rows.append([str(p), *shares, str(sum(one.changed > 0 for one in found)), f"{total / seconds:,.0f}"])
    about = tables.header_lines(head)[:3]
    about.append(f"- {len(chosen)} documents of {total:,} tokens, at most {LONGEST} characters each")
    say("\n".join([*about, "", *tables.markdown_table(rows)]))
    return EXIT_OK
