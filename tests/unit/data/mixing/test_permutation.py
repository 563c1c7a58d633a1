"""The keyed permutation: one-to-one, different per key, without visible structure, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.data.mixing.permutation import ROUNDS, derive_key, derive_keys, permute, unpermute


def test_every_small_size_is_permuted_and_undone() -> None:
    for size in range(1, 301):
        key = derive_key(0, "small", size)
        image = permute(np.arange(size), size, key)
        assert np.array_equal(np.sort(image), np.arange(size)), size
        assert np.array_equal(unpermute(image, size, key), np.arange(size)), size


@given(st.integers(1, 50_000), st.integers(0, 2**63))
@settings(max_examples=40, deadline=None)
def test_larger_sizes_are_permuted(size: int, seed: int) -> None:
    image = permute(np.arange(size), size, derive_key(seed, "large"))
    assert np.array_equal(np.bincount(image, minlength=size), np.ones(size))


@given(st.integers(2**20, 2**53), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_huge_sizes_come_back(size: int, seed: int) -> None:
    index = np.random.default_rng(seed).integers(0, size, 500)
    index[:2] = 0, size - 1
    key = derive_key(seed, "huge")
    image = permute(index, size, key)
    assert image.min() >= 0 and image.max() < size
    assert np.array_equal(unpermute(image, size, key), index)


def test_many_sizes_and_keys_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 1000, 400)
    index = rng.integers(0, sizes)
    keys = np.stack([derive_key(2, "at once", i) for i in range(400)], axis=1)
    single = [int(permute(index[i : i + 1], int(sizes[i]), keys[:, i])[0]) for i in range(400)]
    image = permute(index, sizes, keys)
    assert image.tolist() == single
    assert np.array_equal(unpermute(image, sizes, keys), index)


def test_keys_are_distinct_and_fixed_for_ever() -> None:
    orders = {
        tuple(permute(np.arange(40), 40, derive_key(seed, name, epoch)).tolist())
        for seed in range(10)
        for name in ("web", "web2", "qa")
        for epoch in range(10)
    }
    assert len(orders) == 300
    # a name that contains a number is not the number's stream
    assert not np.array_equal(derive_key(1, "a", 2), derive_key(1, "a", "2"))
    # written down once: the order of finished runs must never change
    assert permute(np.arange(12), 12, derive_key(1234, "web", 0)).tolist() == GOLDEN
    assert hex(int(derive_key(1234, "web", 0)[0])) == GOLDEN_KEY


GOLDEN = [0, 7, 8, 4, 11, 10, 5, 2, 1, 3, 6, 9]
GOLDEN_KEY = "0x45963d5ff1a026b2"


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 16, 30])
def test_all_places_are_equally_likely_over_keys(size: int) -> None:
    """Chi-square of (index, image) over keys; the threshold is at seven standard deviations."""
    repeats = 20_000
    keys = np.random.default_rng(size).integers(0, 2**64, (ROUNDS, repeats), dtype=np.uint64)
    table = np.zeros((size, size))
    for index in range(size):
        image = permute(np.full(repeats, index), size, keys)
        table[index] = np.bincount(image, minlength=size)
    expected = repeats / size
    chi_square, freedom = ((table - expected) ** 2 / expected).sum(), (size - 1) ** 2
    assert chi_square < freedom + 7 * np.sqrt(2 * freedom)


def test_small_permutations_are_all_reached() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, (ROUNDS, 24_000), dtype=np.uint64)
    images = np.stack([permute(np.full(24_000, index), 4, keys) for index in range(4)], axis=1)
    counts = np.unique(images, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 23 + 7 * np.sqrt(46)


@pytest.mark.parametrize("size", [1000, 4096, 4097, 100_003])
def test_no_visible_structure(size: int) -> None:
    for seed in range(3):
        image = permute(np.arange(size), size, derive_key(seed, "structure"))
        # first differences of a random permutation have mean size |difference| of size / 3 and few repeats
        steps = np.diff(image)
        assert abs(np.abs(steps).mean() / (size / 3) - 1) < 6 / np.sqrt(size)
        assert np.bincount(steps % size).max() < 12 + np.log(size)
        # where a run of consecutive indices goes: 10 x 10 cells, 81 degrees of freedom
        cells = np.bincount(np.arange(size) * 10 // size * 10 + image * 10 // size, minlength=100)
        assert ((cells - size / 100) ** 2 / (size / 100)).sum() < 81 + 7 * np.sqrt(162)
        # two keys share about one place in expectation
        assert (image == permute(np.arange(size), size, derive_key(seed + 100, "structure"))).sum() < 12


def test_index_out_of_range_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        permute(np.array([5]), 5, derive_key(0))


@pytest.mark.parametrize("name", ["step", 'a "name", ü]'])
def test_keys_made_together_are_those_made_one_by_one(name) -> None:
    numbers = np.array([0, 7, 8, 123_456, 2**40])
    together = derive_keys(-3, name, numbers)
    assert together.flags.c_contiguous and together.dtype == np.uint64
    assert np.array_equal(together, np.stack([derive_key(-3, name, number) for number in numbers.tolist()], axis=1))
