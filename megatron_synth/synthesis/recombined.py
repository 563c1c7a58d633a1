"""The kind `recombined`: concepts of each document by the engine, walks over them, and one request about each walk.

Concepts are a synthesis of their own, of the kind `concepts`, in the folder `concepts` of the output: with answers, account and
record as any other. Its corpus has a list for each document. From the lists comes the graph, from the graph the walks, each
with the concepts that it met and the documents that together hold most of them (`selection/concepts.py`), whose passages are
shown. With `walks.concepts: keywords` the lists are keywords of the documents, and there is no such synthesis.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator

from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing.readers.synthesized import CORPUS, RECORD, SynthesisRecord, read_record
from megatron_synth.synthesis.documents.chunks import Chunk, cut
from megatron_synth.synthesis.documents.counting import TokenCounter
from megatron_synth.synthesis.documents.parents import Parent
from megatron_synth.synthesis.filters.base import REASONS, FiltersConfig
from megatron_synth.synthesis.kinds.keywords import Keywords
from megatron_synth.synthesis.kinds.template import Template
from megatron_synth.synthesis.requests import digest
from megatron_synth.synthesis.selection.concepts import ConceptGraph
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

FOLDER = "concepts"
KIND = "concepts"
MOST_CONCEPTS = 12
"""Of a document: more than it was asked for is no list."""
LONGEST = 60
_BULLET = re.compile(r"^\s*(?:[-*\u2022]+|\(?\d{1,2}[.):]|(?:topics?|(?:key )?concepts?)\s*:)\s*", re.IGNORECASE)


def extraction(config: SynthesisConfig) -> SynthesisConfig:
    """The synthesis that lists the concepts of the parents, by the same generator. Short lists pass its filters."""
    off = tuple(reason for reason in REASONS if reason not in ("empty", "refusal", "cut_at_limit"))
    changes = {
        "output": str(config.folder / FOLDER),
        "kind": KIND,
        "template": None,
        "walks": None,
        "per_parent": 1,
        "missing_chunks": "join",
        "filters": FiltersConfig.model_validate({"off": off}),
    }
    return config.model_copy(update=changes)


def is_asked(config: SynthesisConfig) -> bool:
    """Whether the generator lists the concepts that this file's requests are about."""
    return config.walks is not None and config.walks.concepts == "generator"


def is_missing(config: SynthesisConfig) -> bool:
    """Whether the concepts must be listed before anything else."""
    return is_asked(config) and not (config.folder / FOLDER / RECORD).is_file()


def extraction_record(config: SynthesisConfig) -> SynthesisRecord:
    """How the concepts were made.

    Raises:
        UserError: they were not, or the record is damaged.
    """
    return read_record(config.folder / FOLDER)


def concepts_of(text: str) -> list[str]:
    """The concepts in an answer, one on a line, without bullets, numbers and labels; sentences are none."""
    found = []
    for line in text.splitlines():
        concept = _BULLET.sub("", _BULLET.sub("", line)).strip(" .;,*\"'`")
        if 2 <= len(concept) <= LONGEST and len(concept.split()) <= 6:
            found.append(concept)
    return found[:MOST_CONCEPTS]


def graph_of(config: SynthesisConfig) -> ConceptGraph:
    """The graph of the concepts of all documents, by their ids.

    Raises:
        UserError: they have not been made yet, or are damaged.
    """
    record = extraction_record(config)
    lists: dict[str, list[str]] = {}
    for name in record.files:
        file = config.folder / FOLDER / CORPUS / name
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    entry = json.loads(line)
                    (parent, *_), text = entry["parents"], str(entry["text"])
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{file}, line {number}: damaged; give `synthesize run` again") from None
                lists[str(parent)] = concepts_of(text)
    return ConceptGraph(lists)


def keyword_graph(seed: int, parents: Iterable[Parent]) -> ConceptGraph:
    """The same graph of keywords of the documents, drawn with a seed. parents: is read twice."""
    keywords = Keywords(parent.text for parent in parents)
    return ConceptGraph(
        {
            parent.id: keywords.draw(parent.text, MOST_CONCEPTS, int(digest([KIND, seed, parent.id])[:16], 16))
            for parent in parents
        }
    )


def walk_chunks(
    config: SynthesisConfig, template: Template, counter: TokenCounter, parents: Iterable[Parent], counted: Callable[[], None]
) -> Iterator[Chunk]:
    """A chunk for each walk, in the order of the walks, with the documents that it goes over as parents.

    Memory holds the concepts of all documents, and the text of those that walks go over. counted: called for each document.

    Raises:
        UserError: the concepts have not been made, or no two of them stand in one document.
    """
    assert config.walks is not None
    graph = graph_of(config) if is_asked(config) else keyword_graph(config.seed, parents)
    try:
        walks = [graph.walk(config.seed, at, config.walks.length, config.walks.parents) for at in range(config.walks.count)]
    except ValueError as error:
        where = f"{config.folder / FOLDER}: " if is_asked(config) else "walks.concepts: keywords: "
        raise UserError(
            f"{where}{error}: there is nothing to walk over; a generator that follows instructions lists concepts, and more "
            f"parents have more of them in common"
        ) from None
    wanted = {parent for walk in walks for parent in walk.parents}
    found: dict[str, Parent] = {}
    for parent in parents:
        counted()
        if parent.id in wanted:
            found[parent.id] = parent
    for number, walk in enumerate(walks):
        parents = tuple(found[parent] for parent in walk.parents if parent in found)
        if not parents:
            continue  # the parents are others than when the concepts were made
        passages = tuple(_passage(parent.text, walk.concepts, template.parent_tokens, counter) for parent in parents)
        text = "\n\n".join(passages)
        yield Chunk(parents, text, number, 1, sum(counter.count(passages)), (", ".join(walk.concepts), *passages))


def _passage(text: str, concepts: Iterable[str], limit: int, counter: TokenCounter) -> str:
    """The part of a text that names most of the concepts, the first of equal ones."""
    parts = [part.strip() for part in cut(text, limit, counter) if part.strip()]
    return max(parts, key=lambda part: sum(concept in " ".join(part.casefold().split()) for concept in concepts))
