"""Names that come out of files name files of their own folder."""

from __future__ import annotations

import pytest

from megatron_synth.core.names import plain_name
from megatron_synth.data.shards.manifest import ShardInfo, TokenizerInfo

OUTSIDE = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\u202ex", "n" * 256, 1, None, ["a"]]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_and_control_characters_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"file: expected (a plain name|the name of a file)"):
        plain_name(name, "file")


@pytest.mark.parametrize("name", ["a", "shard-00000", ".hidden", "ä b", "..a", "n" * 255])
def test_names_are_kept(name: str) -> None:
    assert plain_name(name, "file") == name


@pytest.mark.parametrize("name", [name for name in OUTSIDE if isinstance(name, str)])
def test_a_manifest_names_files_of_its_own_folder(name: str) -> None:
    digest = "0" * 64
    numbers = {"documents": 1, "tokens": 1, "bin_bytes": 2, "idx_bytes": 1, "bin_sha256": digest, "idx_sha256": digest}
    assert ShardInfo(name="shard", **numbers).name == "shard"
    with pytest.raises(ValueError, match=r"name\n"):
        ShardInfo(name=name, **numbers)


@pytest.mark.parametrize("path", ["", "..", "../..", "../../x", "../a/b", "/etc/passwd", "../\x1b", "a/../b"])
def test_a_manifest_s_tokenizer_is_beside_it(path: str) -> None:
    about = {"fingerprint": "0" * 64, "vocab_size": 1, "eod_id": 0}
    for sound in ("tokenizer.json", "../tokenizer.json"):
        assert TokenizerInfo(path=sound, **about).path == sound
    with pytest.raises(ValueError, match=r"path\n"):
        TokenizerInfo(path=path, **about)
