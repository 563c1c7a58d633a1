"""Choosing documents: coverage against exhaustion, walks and losses by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.selection.concepts import ConceptGraph
from megatron_synth.synthesis.selection.coverage import (
    Neighbors,
    choose_at_random,
    greedy_coverage,
    hashed_ngrams,
    nearest,
    select,
)
from megatron_synth.synthesis.selection.losses import DocumentLoss, highest_losses


def graph(similar: np.ndarray) -> Neighbors:
    """All pairs of a symmetric matrix."""
    total = similar.shape[0]
    others = np.array([other for row in range(total) for other in range(total) if other != row])
    rows = np.repeat(np.arange(total), total - 1)
    return Neighbors(np.arange(total + 1) * (total - 1), others, similar[rows, others])


def covered(similar: np.ndarray, chosen: tuple[int, ...], threshold: float) -> int:
    near = (similar >= threshold) | np.eye(similar.shape[0], dtype=bool)
    return int(near[list(chosen)].any(axis=0).sum())


@pytest.mark.parametrize("seed", range(20))
def test_greedy_covers_its_share_of_the_best(seed: int) -> None:
    generator = np.random.default_rng(seed)
    total, k = int(generator.integers(4, 12)), int(generator.integers(1, 4))
    half = generator.random((total, total))
    similar = (half + half.T) / 2
    threshold = float(generator.uniform(0.3, 0.8))
    chosen, count = greedy_coverage(graph(similar), k, threshold)
    assert len(set(chosen)) == k and count == covered(similar, tuple(chosen), threshold)
    best = max(covered(similar, choice, threshold) for choice in itertools.combinations(range(total), k))
    assert (1 - 1 / math.e) * best <= count <= best
    # each choice covers most of what is left, and of equal ones it is the first
    for step in range(k):
        gains = [covered(similar, (*chosen[:step], other), threshold) for other in range(total)]
        assert gains[chosen[step]] == max(gains) and (step or chosen[0] == int(np.argmax(gains)))


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_largest_that_covers(seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.random(30)
    similar = 1 - np.abs(points[:, None] - points)
    found = select(graph(similar), 4, 0.8)
    assert found.threshold is not None and found.covered >= 0.8
    assert found.covered == covered(similar, found.chosen, found.threshold) / 30
    above = similar[similar > found.threshold + 1e-6].min()
    assert greedy_coverage(graph(similar), 4, float(above))[1] < 0.8 * 30


def test_all_of_all_is_the_identity_and_wrong_numbers_are_refused() -> None:
    neighbors = nearest(hashed_ngrams(["one", "two", "three"]))
    assert select(neighbors, 3).chosen == (0, 1, 2) and select(neighbors, 3).covered == 1
    for k, coverage in ((0, 0.9), (4, 0.9), (2, 0.0), (2, 1.1)):
        with pytest.raises(UserError, match="expected"):
            select(neighbors, k, coverage)
    assert select(nearest(hashed_ngrams(["one"])), 1).chosen == (0,)


def test_one_of_each_cluster_is_chosen() -> None:
    texts = [
        f"{topic} and more words about {topic} number {number}" for topic in ("tides", "bread", "trains") for number in range(6)
    ]
    neighbors = nearest(hashed_ngrams(texts))
    chosen = select(neighbors, 3, 1.0).chosen
    assert [number // 6 for number in chosen] == [0, 1, 2]
    assert len(choose_at_random(18, 3, 0)) == 3 and choose_at_random(18, 18, 0) == tuple(range(18))
    assert choose_at_random(18, 3, 0) == choose_at_random(18, 3, 0) != choose_at_random(18, 3, 1)


def test_vectors_by_hand() -> None:
    vectors = hashed_ngrams(["tide tide", "tide tide", "moon", "..."], 1 << 16)
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0])
    assert np.allclose(vectors @ vectors.T, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    # `tide` twice and `tide tide` once, in the same two documents: the root of 2, and 1
    assert sorted(np.abs(vectors[0][vectors[0] != 0]).tolist()) == pytest.approx([math.sqrt(1 / 3), math.sqrt(2 / 3)])


@pytest.mark.parametrize("count", [1, 3, 256])
def test_neighbors_are_the_most_similar(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    wanted = {(row, int(other)) for row in range(50) for other in np.argsort(-similar[row])[: min(count, 49)]}
    wanted |= {(other, row) for row, other in wanted}
    found = nearest(vectors, count)
    rows = np.repeat(np.arange(50), np.diff(found.starts)).tolist()
    assert list(zip(rows, found.others.tolist(), strict=True)) == sorted(wanted)
    assert np.allclose(found.similarities, similar[rows, found.others], atol=1e-5)


CONCEPTS = {
    "tides": ["Moon", "sea", "gravity"],
    "sailing": ["sea", "wind", " SEA "],
    "orbits": ["moon", "gravity"],
    "alone": ["bread"],
}


def test_walks_follow_edges_across_documents() -> None:
    concepts = ConceptGraph(CONCEPTS)
    assert concepts.neighbors["moon"] == pytest.approx({"gravity": math.log(3), "sea": math.log(2)})
    assert concepts.neighbors["bread"] == {}
    walks = [concepts.walk(0, number, 4) for number in range(200)]
    assert walks[0] == concepts.walk(0, 0, 4) and len({walk.concepts for walk in walks}) > 4
    for walk in walks:
        assert len(set(walk.concepts)) == len(walk.concepts) >= 2
        assert all(two in concepts.neighbors[one] for one, two in itertools.pairwise(walk.concepts))
        held = set().union(*(concepts.documents[key] for key in walk.parents))
        assert set(walk.concepts) <= held
    assert any(len(walk.parents) == 2 for walk in walks)
    starts = [walk.concepts[0] for walk in walks]
    expected = (math.log(2) * 3) / (2 * (3 * math.log(2) + math.log(3)))  # the sea has three of the edges' ends
    assert abs(starts.count("sea") / 200 - expected) < 5 * math.sqrt(expected * (1 - expected) / 200)


def test_parents_are_few_and_a_graph_without_edges_is_refused() -> None:
    concepts = ConceptGraph(CONCEPTS)
    assert concepts._parents(["moon", "sea", "wind"], 3) == ("sailing", "orbits")
    assert concepts._parents(["moon", "sea", "gravity"], 3) == ("tides",)
    assert concepts._parents(["moon", "sea", "wind"], 1) == ("sailing",)
    with pytest.raises(ValueError, match="no two concepts"):
        ConceptGraph({"a": ["one"], "b": ["two"]}).walk(0, 0, 3)


def test_highest_losses_by_hand() -> None:
    losses = {"b": DocumentLoss(200, 100), "a": DocumentLoss(100, 50), "c": DocumentLoss(90, 30), "d": DocumentLoss(300, 100)}
    assert highest_losses(losses, 3) == ["d", "a", "b"]  # c is too short; a and b have both 2 nats
    assert highest_losses(losses, 9, min_tokens=1) == ["c", "d", "a", "b"]
    assert highest_losses({}, 1) == []
    with pytest.raises(UserError, match="at least 1"):
        highest_losses(losses, 0)
    with pytest.raises(UserError, match="did not diverge"):
        highest_losses({"a": DocumentLoss(math.nan, 50)}, 1)
