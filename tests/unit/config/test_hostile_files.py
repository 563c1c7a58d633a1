"""Configurations as a stranger would write them; the whole campaign is `python -m tests.faults.config_mutations`."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from megatron_synth.config import yaml12
from megatron_synth.config.errors import ConfigError, Problem, UserError
from megatron_synth.config.load import MAX_FILES, load_file, load_yaml
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config
from tests.faults import config_mutations
from tests.support import write_config, write_corpus


def test_hostile_files_and_names_are_read_or_refused(tmp_path: Path) -> None:
    happened, _ = config_mutations.campaign(tmp_path, 120, seed=3)
    assert sum(happened.values()) == 120 and happened["refused"] > 30 and happened["read"] > 5


@pytest.mark.parametrize("character", config_mutations.HIDDEN)
@pytest.mark.parametrize("text", ["data: {{sources: {{a{}b: 1}}}}", "x: [a, 'b{}']"])
def test_characters_that_are_not_shown(character: str, text: str) -> None:
    try:
        value = yaml12.parse(text.format(character), "file")
    except ConfigError as error:
        assert any(words in str(error) for words in ("is not shown; leave it out", "not YAML"))
    else:  # a line break of YAML's, which it folds
        assert character == "\x85" and value == {"x": ["a", "b "]}


@pytest.mark.parametrize("text", ["データ", "é", "e\u0301", "a b", "😀", "न\u0940", "\u1100\u1161"])
def test_text_of_people_is_read(text: str) -> None:
    assert unicodedata.normalize("NFC", yaml12.parse(f"x: '{text}'", "file")["x"]) == unicodedata.normalize("NFC", text)


def test_bases_that_name_each_other_twice(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"base: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("train: {steps: 1}\n")
    with pytest.raises(UserError, match=f"more than {MAX_FILES} files are read for one configuration"):
        load_yaml(tmp_path / "0.yaml")


def test_a_base_that_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {'x' * 100_000}\n")
    with pytest.raises(UserError, match="no configuration file x") as caught:
        load_yaml(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 2000


def test_messages_are_bounded(tmp_path: Path) -> None:
    assert len(str(ConfigError("file", [Problem("k", "x" * 10_000)] * 1000))) < 60_000
    (tmp_path / "a.yaml").write_text("".join(f"k{number}: 1\n" for number in range(5000)))
    with pytest.raises(ConfigError, match=r"and 495\d more") as caught:
        load_file(PrepareConfig, tmp_path / "a.yaml")
    assert len(caught.value.problems) > 5000


def test_windows_of_one_token_are_refused(tmp_path: Path) -> None:
    file = write_config(tmp_path / "run.yaml", write_corpus(tmp_path / "corpus"))
    with pytest.raises(UserError, match=r"windows_per_sequence: 32 leaves windows of one token"):
        load_file(Config, file, ["data.windows_per_sequence=32"])
