"""Files below configs/synthesis are sound."""

from __future__ import annotations

import pytest

from megatron_synth.config.load import load_file, shipped
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.synthesis.kinds.template import load_template, template_of
from megatron_synth.synthesis.synthesis_file import load_synthesis

FOLDER = shipped("configs") / "synthesis"


@pytest.mark.parametrize("name", ["rephrase", "tiny-hardest", "tiny-qa", "tiny-rephrase"])
def test_synthesis_files_are_sound(name):
    config = load_synthesis(f"synthesis/{name}.yaml")
    assert template_of(config.kind, config.template).made_from == "text"


def test_the_file_of_concepts_is_sound():
    config = load_synthesis("synthesis/recombined.yaml")
    assert template_of(config.kind, config.template).made_from == "concepts"
    assert config.walks is not None


def test_the_small_template_of_concepts_is_sound():
    assert load_template(FOLDER / "templates" / "tiny-recombined.yaml").made_from == "concepts"


@pytest.mark.parametrize("name", ["tiny-qa", "tiny-rephrase"])
def test_templates_say_whose_wording_they_are(name):
    assert load_template(FOLDER / "templates" / f"{name}.yaml").origin == "ours"


def test_validation_text_of_make_synthesis_is_no_parent():
    prepared = load_file(PrepareConfig, "data/synthesis.yaml").sources["natural"]
    parents = load_synthesis("synthesis/tiny-qa.yaml").parents["natural"]
    assert prepared.holdout == parents.holdout is not None
    assert prepared.builtin == parents.builtin == "natural"
