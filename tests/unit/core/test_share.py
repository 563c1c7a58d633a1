"""Shares of some work by what they are written as."""

from __future__ import annotations

import pytest

from megatron_synth.core.share import MAX_SHARES, Share


@pytest.mark.parametrize("share", [Share(0, 1), Share(3, 16), Share(MAX_SHARES - 1, MAX_SHARES)])
def test_a_share_is_found_by_the_name_of_its_folder(share: Share) -> None:
    assert Share.of_folder(share.folder) == share
    assert Share.parse(f"{share.number}/{share.of}") == share


@pytest.mark.parametrize(
    "name",
    [
        "share-notes-of-lunch",
        "share-00003-of-00003",
        "share-00000-of-00000",
        "share-0-of-4",
        "share-000001-of-00004",
        ".share-00001-of-00004",
    ],
)
def test_other_folders_are_no_shares(name: str) -> None:
    assert Share.of_folder(name) is None
