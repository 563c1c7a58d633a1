"""What a run tells on the console, and how numbers are written there."""

from __future__ import annotations

import math
import os
import re
import sys

# What a terminal would obey, or show in another order than it stands there: C0 and C1 without line breaks and tabs, and the
# marks of bidirectional text. Names and text of a corpus may hold them. Halves of surrogate pairs are what Python makes of a
# file's name that is not UTF-8, and nothing draws or writes them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_first_rank() -> bool:
    """Whether this process is rank 0, or was not started by a launcher at all."""
    return os.environ.get("RANK", "0") == "0"


def visible(text: str) -> str:
    r"""`text` with control characters written out, such as `\x1b`; line breaks and tabs stay."""
    return _CONTROL.sub(lambda match: _written_out(match[0]), text)


def one_line(text: str) -> str:
    """`text` for a cell or a line of its own: line breaks and tabs are written out, too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def show(text: str, *, error: bool = False, end: str = "\n", control: str = "") -> None:
    """Print `text` at once, on any rank. On a terminal its control characters are written out.

    Args:
        text: of any origin.
        error: to standard error.
        end: what follows.
        control: what goes before, for the terminal to obey.

    Raises:
        OSError: standard output cannot be written.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed by who started this process
        return
    if stream.isatty():
        text = visible(text)
    # what the stream cannot encode, such as half of a surrogate pair in a name, is written out as well
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    # one write: torchrun runs ranks unbuffered, where print's own line break is another one that its log tears off
    try:
        print(control + text + end, end="", file=stream, flush=True)
    except OSError as failed:
        if not error:  # else nowhere is left to tell that this cannot be told
            raise OSError(failed.errno, failed.strerror, "standard output") from failed


def say(text: str, *, control: str = "") -> None:
    """`show` to standard output, on rank 0 only."""
    if is_first_rank():
        show(text, control=control)


def human(value: float) -> str:
    """Three significant digits and a decimal suffix: `41.2k`, `1.23B`, `850`."""
    if not math.isfinite(value):
        return str(value)
    exponent, magnitude = 0, float(f"{abs(value):.3g}")
    while magnitude >= 1000 and exponent < 5:
        magnitude, exponent = magnitude / 1000, exponent + 1
    digits = 0 if magnitude >= 100 or (exponent == 0 and magnitude == int(magnitude)) else 1 if magnitude >= 10 else 2
    return f"{'-' if value < 0 else ''}{magnitude:.{digits}f}{('', 'k', 'M', 'B', 'T', 'P')[exponent]}"


def compact(value: float) -> str:
    """A round number as short as it goes: `20M`, `1.5B`."""
    text = human(value)
    number = text.rstrip("kMBTP")
    return (f"{float(number):g}" if "." in number else number) + text[len(number) :]


def scientific(value: float) -> str:
    """`1.26e+08`."""
    return f"{value:.2e}"


def duration(seconds: float) -> str:
    """`h:mm:ss`, such as `0:18:37`; `n/a` when it is not known (infinite or not a number)."""
    if not math.isfinite(seconds):
        return "n/a"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 rank`, `2 ranks`, `3 micro-batches`."""
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"


def gib(size: float) -> str:
    """Bytes as GiB with one decimal, two below 10: `62.1`, `0.43`."""
    value = size / 2**30
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows: list[tuple[str, ...]], words: bool = False) -> str:
    """Columns aligned under their heads (the first row): the first to the left, all others, unless words, to the right."""
    rows = [tuple(map(one_line, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if words else cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
