"""What went wrong in object storage, in words: which object, what was to be done with it, what to do now.

Libraries raise what they like: an error is read by the answer's status and code, and by the names of its classes, so that none
of these libraries has to be imported.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.storage.remote import Remote

SKEW_S = 300.0
"""A clock that is so far off its store's is named: stores refuse what was signed 15 minutes away from their time."""
_CONNECTION = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
    "ResponseStreamingError",
}
_TIMEOUTS = {"ConnectTimeoutError", "FSTimeoutError", "ReadTimeoutError", "ServerTimeoutError", "TimeoutError"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "503", "429"}
_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301", "307"}
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "GOOGLE_OAUTH_ACCESS_TOKEN")


class StorageError(UserError):
    """Something is wrong with an object. The message names it, what was done with it, and what to do."""


class ObjectMissing(StorageError):
    """There is no such object."""


@dataclass(frozen=True)
class Fault:
    """What an error of a library means."""

    kind: str
    """denied, skew, bucket, missing, changed, altered, region, throttled, timeout, cut, full, library or other."""
    detail: str = ""

    @property
    def passes(self) -> bool:
        """Whether the same may succeed a little later."""
        return self.kind in ("altered", "throttled", "timeout", "cut")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _answer(error: BaseException) -> tuple[str, int, dict[str, Any]]:
    """Code, status and headers of the answer that an error tells of; empty where it tells of none."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            metadata = response.get("ResponseMetadata") or {}
            found = response.get("Error") or {}
            headers = {str(key).lower(): value for key, value in (metadata.get("HTTPHeaders") or {}).items()}
            headers |= {"region": found["Region"]} if found.get("Region") else {}
            return str(found.get("Code", "")), int(metadata.get("HTTPStatusCode") or 0), headers
        status = getattr(one, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int):
            return str(status), status, {}
    return "", 0, {}


def fault_of(error: BaseException) -> Fault:
    """What an error of a library means."""
    if isinstance(error, ImportError):
        return Fault("library", str(error))
    code, status, headers = _answer(error)
    names = {base.__name__ for one in _chain(error) for base in type(one).__mro__}
    offset = _clock_offset(headers)
    if code == "RequestTimeTooSkewed" or (status == 403 and offset is not None and abs(offset) > SKEW_S):
        return Fault("skew", "" if offset is None else f"{abs(offset):.0f} s")
    if code in _THROTTLED or status in (429, 503):
        return Fault("throttled", code)
    if code in _REGION or (status == 400 and "x-amz-bucket-region" in headers):
        return Fault("region", str(headers.get("x-amz-bucket-region") or headers.get("region") or ""))
    if code == "NoSuchBucket":
        return Fault("bucket")
    if code in ("PreconditionFailed", "412") or "FileExpired" in names:
        return Fault("changed")
    if names & {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "NoAuthTokenError"}:
        return Fault("denied", "no credentials were found")
    if isinstance(error, PermissionError) or status in (401, 403):
        return Fault("denied", code if not code.isdecimal() else "")
    if isinstance(error, FileNotFoundError) or status == 404:
        return Fault("missing")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not code:
        return Fault("full", error.strerror or "")
    if "FlexibleChecksumError" in names:
        return Fault("altered")
    if names & _TIMEOUTS or code == "RequestTimeout":
        return Fault("timeout")
    if names & _CONNECTION or status >= 500:
        return Fault("cut", code)
    return Fault("other", scrubbed(str(error).strip().split("\n")[0][:200] or type(error).__name__))


def _clock_offset(headers: dict[str, Any]) -> float | None:
    """Seconds by which this machine's clock is ahead of the one that answered."""
    try:
        theirs = parsedate_to_datetime(str(headers["date"]))
        return (datetime.now(UTC) - theirs).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def scrubbed(text: str) -> str:
    """A text without the credentials that the environment holds."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 4:
            text = text.replace(value, "...")
    return text


def explained(error: BaseException, place: Remote, action: str, attempts: int) -> StorageError:
    """The message for an error that came in the last of `attempts` while `action` (such as `read`) was done with an object."""
    fault = fault_of(error)
    tries = f"in {attempts} attempts" if attempts > 1 else "at once"
    advice = "check the credentials, from the environment or the library's own files, and what they may do there"
    detail = f" ({fault.detail})" if fault.detail else ""
    text = {
        "denied": f"access is denied{detail}; {advice}",
        "skew": f"refused: the clock of this machine is off{detail and ' by ' + fault.detail}; set it (NTP), and start again",
        "bucket": f"there is no bucket {place.bucket!r}; make it, or correct the name",
        "missing": "there is no such object; check the name",
        "changed": "it changed while it was used; leave it alone until the run has ended, and start again",
        "altered": f"what came is not what the store says that it holds, by its checksum, {tries}; copy it there again",
        "region": f"the bucket {place.bucket!r} is in another region{detail}; set AWS_DEFAULT_REGION to "
        f"{fault.detail or 'its region'}, and AWS_ENDPOINT_URL to an address there if it is set",
        "throttled": f"the store asked to slow down, {tries}; start again later, or with fewer processes",
        "timeout": f"no answer came {tries}; check the network and the endpoint, and start again",
        "cut": f"the connection failed{detail} {tries}; check the network and the endpoint, and start again",
        "full": f"the disk is full{detail}; make room, and start again",
        "library": f"{fault.detail or 'a package is missing'}; install it with: pip install 'megatron-synth[remote]'"
        + (" gcsfs" if place.scheme == "gs" else ""),
        "other": f"{fault.detail}; check the object and the credentials",
    }[fault.kind]
    kind = ObjectMissing if fault.kind == "missing" else StorageError
    return kind(f"{place}: could not {action}: {text}")
