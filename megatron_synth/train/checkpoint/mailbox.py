"""Small messages between ranks through the store of the process group, which others may be able to write to.

A message is JSON with a keyed digest. The key is made from a secret that the launcher hands to the ranks (`SECRET`), where
there is one, and from random bytes that rank 0 sends through the process group, not the store. The digest is of the name of the
message and the start of the run too: one that was seen cannot be shown again elsewhere. What has no such digest is as if it
were not there.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
import zlib
from typing import Any

import torch

from megatron_synth.config.errors import RankError
from megatron_synth.core.log import say

SECRET = "MEGATRON_SYNTH_SECRET"
"""Environment variable: a word that the ranks of a start share and nobody else knows. Launchers make a new one each time."""
_DIGEST = "sha256"
_DIGEST_BYTES = 32
_TOKEN_BYTES = 32
_POLL_S = 0.01
_LONGEST_POLL_S = 0.5


class Mailbox:
    """Messages by name. All ranks make one, alike; then any of them, in any thread, may put and get.

    Args:
        attempt: a word that no other start of the run has used, equal on all ranks.

    Raises:
        RankError: this rank was handed another secret than rank 0.
    """

    def __init__(self, attempt: str):
        store = torch.distributed.distributed_c10d._get_default_store()
        # a connection of its own: a thread must not wait for what the process group asks its store
        self._store = torch.distributed.PrefixStore(f"mail/{attempt}", store.clone())  # type: ignore[attr-defined]
        self._attempt, self._key, self._told = attempt, _shared_key(), False

    def put(self, name: str, value: Any) -> None:
        """Leave a message: `value`, which JSON can hold."""
        content = zlib.compress(json.dumps(value).encode(), 1)
        self._store.set(name, self._digest(name, content) + content)  # type: ignore[arg-type]

    def get(self, name: str) -> Any:
        """The message of that name, when it is there."""
        pause = _POLL_S
        while True:
            if self._store.check([name]):
                letter = bytes(self._store.get(name))
                digest, content = letter[:_DIGEST_BYTES], letter[_DIGEST_BYTES:]
                if hmac.compare_digest(digest, self._digest(name, content)):
                    return json.loads(zlib.decompress(content))
                if not self._told:
                    say(f"warning: a message of another process was found in the store of this run ({name}) and passed over")
                    self._told = True
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_POLL_S)

    def _digest(self, name: str, content: bytes) -> bytes:
        return hmac.digest(self._key, f"{self._attempt}/{name}\n".encode() + content, _DIGEST)


def _shared_key() -> bytes:
    """A key that all ranks have, and nobody who can read the store."""
    given = os.environ.get(SECRET, "").encode()
    own = hashlib.blake2b(given, digest_size=_TOKEN_BYTES, person=b"megatron-synth").digest()
    sent = torch.frombuffer(bytearray(secrets.token_bytes(_TOKEN_BYTES) + own), dtype=torch.uint8)
    torch.distributed.broadcast(sent, src=0)
    content = bytes(sent.tolist())
    if content[_TOKEN_BYTES:] != own:
        raise RankError(
            f"{SECRET}: this rank was handed another one than rank 0; set it to the same random word on all nodes, as "
            "launch/job.sh does, or nowhere"
        )
    return hmac.digest(given, content[:_TOKEN_BYTES], _DIGEST)
