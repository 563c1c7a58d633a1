"""One server of S3 for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_synth.storage import objects
from tests.object_store import BUCKET, Store, running


@pytest.fixture(scope="session")
def server() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch, running(patch) as store:
        # pauses that a test need not wait for
        patch.setattr(objects, "FIRST_PAUSE_S", 0.001)
        patch.setattr(objects, "ATTEMPTS", 4)
        yield store


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """The server with an empty bucket."""
    yield server
    import fsspec

    server.rule = None
    files = fsspec.filesystem("s3", use_listings_cache=False)
    found = files.find(BUCKET)
    if found:
        files.rm(found)
