"""Tokens are counted by the generator's tokenizer and by that of the study: in plan, record, status and report."""

from __future__ import annotations

import json

import pytest

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.cli.main import main
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.synthesis.report import write_report
from megatron_synth.synthesis.requests import constant_part
from megatron_synth.synthesis.run import run
from megatron_synth.synthesis.setup import Counted, Setup
from megatron_synth.synthesis.status import status_text
from tests.unit.synthesis.engines.test_embedded import model  # noqa: F401


def test_both_tokenizers_count(synthesis, model, capsys):  # noqa: F811
    tokenizer = str(model / "tokenizer.json")  # a token for each byte
    with RunningStub(context=None) as stub:
        config = synthesis(stub.url, study_tokenizer=tokenizer)
        found = run(config).record
        assert found is not None
        documents = (config.folder / "corpus" / "part-00000.jsonl").read_text().splitlines()
        size = sum(len(json.loads(line)["text"].encode()) for line in documents)
        assert found.tokens == {"study": size}  # the generator's tokenizer is not here
        assert f"{size:,} tokens of the study" in status_text(config)
        assert f"{size:,} tokens of the study" in write_report(config).read_text()
        both = run(config.model_copy(update={"generator": config.generator.model_copy(update={"tokenizer": tokenizer})}))
        assert both.record is not None
        assert both.record.tokens["generator"] == both.record.tokens["study"]
        file = config.folder.with_suffix(".yaml")
        file.write_text(to_yaml(config))
        assert main(["synthesize", "plan", str(file)]) == 0
        (told,) = (line for line in capsys.readouterr().out.splitlines() if "of the study's tokenizer" in line)
        planned = int(told.split("about ")[1].split()[0].replace(",", ""))
        text = sum(len(request.chunk.text.encode()) for request in Setup.of(config, export=False).requests(Counted()))
        assert planned == pytest.approx(0.9 * text, rel=0.01)  # as the template expects
        with pytest.raises(UserError, match=r"study_tokenizer: none\.json: no such file"):
            run(config.model_copy(update={"study_tokenizer": "none.json"}))


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_all_prompts_begin_with_the_part_that_a_prefix_cache_keeps(synthesis, api):
    setup = Setup.of(synthesis("http://127.0.0.1:9", generator={"api": api}), export=False)
    constant = constant_part(setup.template)
    assert len(constant) > 400
    prompts = [request.prompt for request in setup.requests(Counted())]
    joined = [prompt.text or "\n\n".join(content for _, content in prompt.messages) for prompt in prompts]
    assert len(joined) > 60
    assert all(prompt.startswith(constant) for prompt in joined)
