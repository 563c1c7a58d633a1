"""Names of objects and folders in object storage: `s3://bucket/corpus/part-0.jsonl`.

Names are as hostile as files: a bucket may be another's. What is not plain is refused before it is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from megatron_synth.config.errors import UserError

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp"}
"""Schemes, and the package that reads them."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MOST_CHARACTERS = 2048


@dataclass(frozen=True, order=True)
class Remote:
    """An object, or a folder of them. Made by `remote`, which checks its name.

    size: bytes, and etag: what the store calls this content, once it was looked at.
    """

    url: str
    size: int = -1
    etag: str = ""

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        """What stands before `://`."""
        return self.url.partition("://")[0]

    @property
    def bucket(self) -> str:
        """What comes first after the scheme: a bucket or a host."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of its name from the last dot on."""
        return PurePosixPath(self.name).suffix

    def __truediv__(self, name: str) -> Remote:
        return remote(f"{self.url.rstrip('/')}/{name}")

    def looked_at(self, size: int, etag: str) -> Remote:
        """The same object with what the store says of it."""
        return replace(self, size=size, etag=etag)


Location = Path | Remote
"""Where something lies: in the file system or in object storage."""


def is_remote(path: str | Path | Remote) -> bool:
    """Whether a path has a scheme, known or not."""
    return isinstance(path, Remote) or (isinstance(path, str) and _SCHEME.match(path) is not None)


def location_of(path: str | Path | Remote, where: str = "") -> Location:
    """A setting's path as a place.

    where: the setting's name, for messages.

    Raises:
        UserError: a scheme that nothing reads, or a name that is not plain.
    """
    if isinstance(path, Remote):
        return path
    return remote(path, where) if isinstance(path, str) and is_remote(path) else Path(path)


def remote(url: str, where: str = "") -> Remote:
    """The object or folder of a URL.

    Raises:
        UserError: a scheme that nothing reads, credentials or a query in it, or a name that is not plain.
    """
    named = f"{where}: " if where else ""
    match = _SCHEME.match(url)
    scheme = match[1] if match else ""
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise UserError(f"{named}{_shown(url)}: expected a path, or one that begins with {known}")
    # checked before it is shown: what stands before an @ or after a ? may be a secret
    host = url.split("://", 1)[1].split("/", 1)[0]
    if (scheme != "hf" and "@" in host) or "?" in url or "#" in url:
        raise UserError(
            f"{named}{_shown(url)}: a user, a password, a query or a fragment in it; leave them out: credentials come from the "
            "environment or the library's own files"
        )
    parts = url.split("://", 1)[1].rstrip("/").split("/")
    plain = all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in parts)
    if not plain or len(url) > _MOST_CHARACTERS:
        raise UserError(
            f"{named}{_shown(url)!r}: expected a bucket and plain names between single slashes, in at most {_MOST_CHARACTERS} "
            "characters"
        )
    return Remote(url.rstrip("/"))


def _shown(url: str) -> str:
    """A URL without what may be a secret."""
    try:
        found = urlsplit(url)
        host = found.netloc.rpartition("@")[2]
    except ValueError:
        return url.partition("://")[0] + "://..."
    return f"{found.scheme}://{host}{found.path}"[:200]
