"""Text about concepts of several documents, and parents by loss: from the file to a corpus."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.cli.main import main
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.data.preparing.readers.values import document_id
from megatron_synth.synthesis.recombined import concepts_of, extraction_record, graph_of
from megatron_synth.synthesis.report import write_report
from megatron_synth.synthesis.run import run
from megatron_synth.synthesis.setup import Setup
from megatron_synth.synthesis.shares import Share
from megatron_synth.synthesis.status import status_text
from tests.unit.synthesis.engines.test_embedded import model  # noqa: F401
from tests.unit.synthesis.test_run import product

TEXTS = {
    "tides": "The moon pulls the sea, and gravity makes the tide rise twice a day along every open coast of the world.",
    "sails": "The sea carries ships by the wind; a sail turns the wind into motion along the coast and across the bay.",
    "orbit": "Gravity keeps the moon on its orbit, and an orbit is a fall that never ends around the heavier body below.",
    "bread": "An oven bakes bread from flour, water, salt and yeast while the baker sleeps for two short hours at night.",
}
CONCEPTS = {"tides": "moon sea gravity coast", "sails": "sea wind coast sail", "orbit": "gravity moon orbit", "bread": "oven"}


def listed(prompt: str) -> str:
    """What the engine says of a document: its concepts, as small models list them."""
    (name,) = (name for name, text in TEXTS.items() if text in prompt)
    return f"Topic: {name}\n" + "\n".join(f"{at}. {one}" for at, one in enumerate(CONCEPTS[name].split(), start=1))


def recombined(synthesis, url, output="out", **changes):
    settings = {
        "kind": "recombined",
        "walks": {"count": 12, "length": 3, "parents": 2},
        "filters": {"off": ["little_of_parent", "copy_of_parent", "wrong_language", "too_short"]},
    }
    return synthesis(url, output, **{**settings, **changes})


@pytest.fixture
def texts(synthesis, tmp_path):
    (tmp_path / "parents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS.values()))
    return synthesis


def test_concepts_become_walks_and_walks_texts_with_several_parents(texts):
    with RunningStub(says=("List the topic", listed)) as stub:
        config = recombined(texts, stub.url)
        found = run(config)
        assert found.record is not None
        first = extraction_record(config)
        assert (first.account.asked, first.account.kept) == (4, 4)
        assert found.record.account.asked == 12 - found.record.skipped["repeated_requests"]
        assert found.record.cost.tokens_out > first.cost.tokens_out > 0
        graph = graph_of(config)
        assert graph.neighbors["moon"] == pytest.approx(
            {"coast": math.log(2), "gravity": math.log(3), "sea": math.log(2), "orbit": math.log(2), "tides": math.log(2)}
        )
        documents = [json.loads(line) for line in (config.folder / "corpus" / "part-00000.jsonl").read_text().splitlines()]
        ids = {document_id(text): name for name, text in TEXTS.items()}
        assert Counter(len(one["parents"]) for one in documents)[2] > 0
        for document in documents:
            assert all(any(part in document["text"] for part in TEXTS[ids[one]].split(", ")) for one in document["parents"][:1])
        seen = stub.seen.requests
        assert run(config).made == 0
        assert stub.seen.requests == seen
        assert write_report(config).read_text().count("<pre>") >= 10
        assert "kept" in status_text(config)

        shares = recombined(texts, stub.url, "shares")
        with pytest.raises(UserError, match="the concepts come first"):
            run(shares, share=Share(0, 2))
        assert "nothing has been made yet" in status_text(shares)
        run(shares)
        assert product(shares.folder) == product(config.folder)


def test_another_seed_walks_elsewhere_and_asks_for_the_same_concepts(texts):
    with RunningStub(says=("List the topic", listed)) as stub:
        one, two = (list(_walks(recombined(texts, stub.url, f"seed-{seed}", seed=seed))) for seed in (1, 2))
        assert one != two and one == list(_walks(recombined(texts, stub.url, "seed-1", seed=1)))
        for concepts, *passages in one:
            assert any(concept in passage.lower() for passage in passages for concept in concepts.split(", "))


def _walks(config):
    from megatron_synth.synthesis.setup import Counted

    run(config)
    return [request.material for request in Setup.of(config, export=False).requests(Counted())]


def test_concepts_are_read_from_lists_of_all_shapes():
    text = (
        "Topic: The Moon\n- tides\n* \u2022 gravity\n3) high water\n(4) coast.\n\nKey concepts: the sea\n" + "a sentence " * 20
    )
    assert concepts_of(text) == ["The Moon", "tides", "gravity", "high water", "coast", "the sea"]
    assert concepts_of("1970s music") == ["1970s music"]


def test_walks_need_concepts_and_concepts_walks(texts, capsys):
    with RunningStub(says=("List the topic", lambda prompt: "only one")) as stub:
        with pytest.raises(UserError, match="nothing to walk over"):
            run(recombined(texts, stub.url))
        for change in ({"walks": None}, {"kind": "hq-rephrase"}):
            with pytest.raises(UserError, match="walks: template"):
                run(recombined(texts, stub.url, "other", **change))
        plan = recombined(texts, stub.url, "plan")
        file = plan.folder.with_suffix(".yaml")
        file.write_text(to_yaml(plan))
        assert main(["synthesize", "plan", str(file)]) == 0
        assert "the concepts come first, and then 12 requests" in capsys.readouterr().out


def test_parents_are_those_of_the_highest_loss(texts, model, capsys):  # noqa: F811
    from tests.unit.synthesis.engines.test_decoding import losses_by_hand

    expected = losses_by_hand(model, list(TEXTS.values()))
    ranked = sorted(TEXTS, key=lambda name: -expected[TEXTS[name]])
    with RunningStub() as stub:
        config = texts(stub.url, hardest={"model": str(model), "count": 2}, engine={"device": "cpu", "dtype": "float32"})
        assert Setup.of(config, export=False).parents.describe()["chosen by loss"]["count"] == 2
        assert "stand in for the hardest" in capsys.readouterr().err
        found = run(config)
        assert found.record is not None
        assert found.record.parent_documents == 2
        documents = [json.loads(line) for line in (config.folder / "corpus" / "part-00000.jsonl").read_text().splitlines()]
        assert {parent for one in documents for parent in one["parents"]} == {document_id(TEXTS[name]) for name in ranked[:2]}
        (file,) = (config.folder / "hardest").glob("losses-*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line, (text, loss) in zip(lines, ((text, expected[text]) for text in TEXTS.values()), strict=True):
            assert line["id"] == document_id(text)
            assert line["loss"] / line["tokens"] == pytest.approx(loss, rel=1e-5)
        before = file.stat().st_mtime_ns
        assert run(config).made == 0
        assert file.stat().st_mtime_ns == before  # evaluated once
        with pytest.raises(UserError, match="no parent has 5000 tokens"):
            run(texts(stub.url, "long", hardest={"model": str(model), "count": 2, "min_tokens": 5000}))


def test_keywords_stand_in_for_concepts_and_ask_for_nothing(texts, capsys):
    walks = {"count": 12, "length": 3, "parents": 2, "concepts": "keywords"}
    with RunningStub(says=("List the topic", lambda prompt: pytest.fail("nothing is listed"))) as stub:
        config = recombined(texts, stub.url, walks=walks)
        material = list(_walks(config))
        assert material
        for concepts, *passages in material:
            for concept in concepts.split(", "):
                holders = [text for text in TEXTS.values() if concept in text.lower()]
                assert len(holders) > 1, "a word of a single document joins nothing"
            assert all(passage in TEXTS.values() for passage in passages)
        assert not (config.folder / "concepts").exists()
        assert material == list(_walks(recombined(texts, stub.url, "again", walks=walks)))
        assert material != list(_walks(recombined(texts, stub.url, "other", walks=walks, seed=2)))
        file = config.folder.with_suffix(".yaml")
        file.write_text(to_yaml(config))
        assert main(["synthesize", "plan", str(file)]) == 0
        assert "the concepts come first" not in capsys.readouterr().out
        assert f"{len(material):,} answers" in status_text(config)
    assert config.settings_digest() != recombined(texts, stub.url).settings_digest()
