"""A keyed permutation of range(n) in constant memory: a Feistel network with cycle walking.

The index is cut into two halves of bits; each round XORs one half with a keyed hash of the other, which is undone by
doing it again (M. Luby, C. Rackoff, SIAM J. Comput. 17 (1988) 373-386). That permutes the next power of two at or
above n; an image outside range(n) is mapped again until it falls inside (J. Black, P. Rogaway, CT-RSA 2002), fewer
than two passes on average. All arithmetic is on unsigned 64-bit integers, so the result is the same on every
platform.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

ROUNDS = 16
"""Each has a 64-bit key. Small sizes set the number: with 8 rounds, some places of range(5) are off by 10 %."""
MAX_SIZE = 1 << 53
"""Largest n: up to here a double holds n exactly, which counts its bits."""

# odd, with well-spread bits: the increment and the first multiplier of splitmix64 (G. Steele et al., OOPSLA 2014)
_MULTIPLY_1 = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_3 = np.uint64(0x94D049BB133111EB)  # its second multiplier
_HALF_WORD = np.uint64(32)
_ONE = np.uint64(1)


def derive_key(seed: int, *stream: str | int) -> UInt64:
    """uint64 [ROUNDS]: round keys for a seed and the name of a stream, such as ("web", 3), from SHAKE-256."""
    digest = hashlib.shake_256(json.dumps([seed, *stream]).encode()).digest(8 * ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def derive_keys(seed: int, name: str, numbers: Int64) -> UInt64:
    """uint64 [ROUNDS, N]: `derive_key(seed, name, number)` of each number [N]; what all names have in common is hashed once."""
    common = hashlib.shake_256(json.dumps([seed, name])[:-1].encode() + b", ")
    digests = []
    for number in numbers.tolist():
        one = common.copy()
        one.update(b"%d]" % number)
        digests.append(one.digest(8 * ROUNDS))
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, ROUNDS).T.astype(np.uint64, order="C")


def permute(index: npt.ArrayLike, size: int | Int64, key: UInt64) -> Int64:
    """Image of each index under the permutation of range(size) that `key` names.

    index: int64 [N], 0 <= index < size. size: one for all, or int64 [N]. key: uint64 [ROUNDS], or [ROUNDS, N].
    Returns int64 [N].
    """
    return _walk(index, size, key, range(ROUNDS))


def keyed_hash(numbers: Int64, key: UInt64) -> UInt64:
    """A 64-bit hash of each number, of any shape; sorted by it, numbers are in random order. key: uint64 [ROUNDS]."""
    values = numbers.astype(np.uint64)
    for one in key[:2]:  # each is what splitmix64 does with one number
        values ^= one
        values ^= values >> np.uint64(30)
        values *= _MULTIPLY_2
        values ^= values >> np.uint64(27)
        values *= _MULTIPLY_3
        values ^= values >> np.uint64(31)
    return values


def unpermute(image: npt.ArrayLike, size: int | Int64, key: UInt64) -> Int64:
    """Inverse of `permute`, for the same size and key; shapes as there."""
    return _walk(image, size, key, range(ROUNDS - 1, -1, -1))


def _walk(index: npt.ArrayLike, size: int | Int64, key: UInt64, rounds: Iterable[int]) -> Int64:
    values = np.array(index, dtype=np.int64)
    sizes = np.asarray(size, dtype=np.int64)
    assert np.all((values >= 0) & (values < sizes)) and np.all(sizes <= MAX_SIZE), "index outside of range(size)"
    result = _feistel(values.view(np.uint64), sizes, key, rounds).view(np.int64)
    outside = np.flatnonzero(result >= sizes)
    while outside.size:
        some_sizes = sizes[outside] if sizes.ndim else sizes
        some_keys = key[:, outside] if key.ndim == 2 else key
        again = _feistel(result[outside].view(np.uint64), some_sizes, some_keys, rounds).view(np.int64)
        result[outside] = again
        outside = outside[again >= some_sizes]
    return result


def _feistel(values: UInt64, sizes: Int64, key: UInt64, rounds: Iterable[int]) -> UInt64:
    """One pass over the power of two at or above each size."""
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)
    low_bits = bits >> _ONE
    low_mask = (_ONE << low_bits) - _ONE
    high_mask = (_ONE << (bits - low_bits)) - _ONE
    low, high = values & low_mask, values >> low_bits
    hashed, shifted = np.empty_like(values), np.empty_like(values)
    for number in rounds:
        source, target, mask = (low, high, high_mask) if number % 2 == 0 else (high, low, low_mask)
        np.bitwise_xor(source, key[number], out=hashed)
        hashed *= _MULTIPLY_1
        np.right_shift(hashed, _HALF_WORD, out=shifted)
        hashed ^= shifted
        hashed *= _MULTIPLY_2
        # the high word is the well-mixed one, and a half has at most 27 bits
        hashed >>= _HALF_WORD
        hashed &= mask
        target ^= hashed
    result: UInt64 = (high << low_bits) | low
    return result
