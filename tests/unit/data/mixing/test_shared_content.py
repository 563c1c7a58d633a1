"""One text under two names is known by its content, whatever the paths."""

import os
import shutil
from fractions import Fraction

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.shared_content import check_epochs, notes
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards.source import open_source
from tests.support import write_source


@pytest.fixture
def text(tmp_path):
    return write_source(tmp_path / "text", 1, 2_000)


def plan(sources, max_epochs):
    specs = [SourceSpec(one.name, Fraction(1, len(sources)), one.num_windows(32), max_epochs) for one in sources]
    return MixturePlan(specs, 1)


def aliases(tmp_path, text):
    """The same text by another spelling, a link, a copy, and links to its files."""
    (tmp_path / "link").symlink_to(text)
    shutil.copytree(text, tmp_path / "copy")
    (tmp_path / "hard").mkdir()
    for path in text.iterdir():
        os.link(path, tmp_path / "hard" / path.name)
    return [text / ".." / "text", tmp_path / "link", tmp_path / "copy", tmp_path / "hard"]


def test_one_text_as_two_sources_is_said_and_its_epochs_count_together(tmp_path, text):
    for other in aliases(tmp_path, text):
        sources = [open_source(text, "a"), open_source(other, "b")]
        (note,) = notes(sources, {})
        assert str(other) in note and "hold the same text: an epoch of the one repeats the other's" in note
        windows = sources[0].num_windows(32)
        check_epochs(plan(sources, 1.0), sources, windows)
        message = f"data.sources.a and data.sources.b hold the same text: together {windows + 2} samples of {windows} windows"
        with pytest.raises(UserError, match=message):
            check_epochs(plan(sources, 1.0), sources, windows + 2)
        check_epochs(plan(sources, float("inf")), sources, 9 * windows)


def test_training_on_what_is_evaluated_is_said(tmp_path, text):
    other = write_source(tmp_path / "other", 2, 2_000)
    sources = [open_source(text, "a"), open_source(other, "b")]
    assert notes(sources, {"v": open_source(write_source(tmp_path / "valid", 3, 2_000), "v")}) == []
    (note,) = notes(sources, {"v": open_source(aliases(tmp_path, text)[2], "v")})
    assert note.startswith("data.validation.v") and "data.sources.a" in note and "what is evaluated is trained on" in note
    manifest = sources[0].manifest.model_copy(update={"split": "validation"})
    manifest.save(text)
    (note,) = notes([open_source(text, "a")], {})
    assert "was prepared as validation text (split: validation), and is trained on" in note


def test_bare_pairs_are_known_by_their_files(tmp_path, text):
    (tmp_path / "x.bin").symlink_to(text / "shard-00000.bin")
    (tmp_path / "x.idx").symlink_to(text / "shard-00000.idx")
    sources = [open_source(text / "shard-00000", "a"), open_source(tmp_path / "x", "b")]
    assert len(notes(sources, {})) == 1
    with pytest.raises(UserError, match="hold the same text"):
        check_epochs(plan(sources, 1.0), sources, sources[0].num_windows(32) + 2)
