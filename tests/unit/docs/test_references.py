"""Documents name what exists, and the check would notice if they did not."""

from __future__ import annotations

import pytest

from docs import references, settings


def test_documents_name_what_exists() -> None:
    assert references.problems() == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `train/loop.py`", []),
        ("see\n`train/lop.py`", [(2, "no file train/lop.py")]),
        ("base: model/tiny-1m.yaml", []),
        ("runs/first/config.yaml", []),
        ("[laws](laws.md) and https://host/page.md", []),
        ("megatron_synth.train.loop", []),
        ("megatron_synth.train.loops", [(1, "no module megatron_synth.train.loops")]),
        ("`megatron-synth trian x.yaml`", [(1, "no verb trian")]),
        ("`tests/unit/docs/test_references.py::test_documents_name_what_exists`", []),
        (
            "`tests/unit/docs/test_references.py::test_documents`",
            [(1, "no test test_documents in tests/unit/docs/test_references.py")],
        ),
        ("`make quickstart` and `make quick`", [(1, "no target quick in the Makefile")]),
        ("```python\n# megatron_synth/nothing.py\n```", []),
    ],
)
def test_what_does_not_exist_is_found_with_its_line(text: str, found: list[tuple[int, str]]) -> None:
    assert list(references.missing(text, references.ROOT / "docs")) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```yaml\ndata:\n  document_masks: true\n```", []),  # what it is not about may be left out
        ("```yaml\ndata:\n  document_mask: true\n```", ["data.document_mask: Extra inputs are not permitted"]),
        ("```yaml\nsources:\n  web: {input: a, columns: {score: float32}}\n```", ["sources.web.kind: Field required"]),
        ("```yaml\nbase: model/1b.yaml\ntrain: {steps: 5}\n```", []),
        ("set `data.cache`, `data.sources.NAME.where: a == 1` and `kernels.NAME`", []),
        ("set `data.cash`", ["no setting data.cash"]),
        ("`megatron-synth train run.yaml data.seeds=1`", ["no setting data.seeds"]),
        ("see `data.json` and `torch.compile`", []),
        ("`megatron-synth prepare x.yaml --slurm --tasks 4`", []),
        ("`megatron-synth prepare x.yaml --task 4`", ["prepare has no option --task"]),
        ("    megatron-synth prepare duplicates out \\\n      --jsn x", ["prepare has no option --jsn"]),
        ("`megatron-synth checkpoint merge RUN --out x`, `sbatch --array`", []),
    ],
)
def test_settings_and_options_that_do_not_exist_are_found(text: str, found: list[str]) -> None:
    assert [what for _, what in settings.wrong(text)] == found
