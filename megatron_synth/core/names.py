"""Names that come out of files."""

from __future__ import annotations


def plain_name(text: object, what: str) -> str:
    """`text` if it is the name of a file in its own folder: no path, no `..`, no control characters.

    Raises:
        ValueError: it is not; the message begins with `what`.
    """
    if not isinstance(text, str) or not text or text in (".", "..") or len(text.encode("utf-8", "replace")) > 255:
        raise ValueError(f"{what}: expected the name of a file, found {text!r:.120}")
    if "/" in text or "\\" in text or not text.isprintable():
        raise ValueError(f"{what}: expected a plain name without a folder or control characters, found {text!r:.120}")
    return text
