"""Every random number of a run as a pure function: order of data, views, dropped labels, dropped branches.

There is no generator and no state. A number is a hash of (seed, what it is for, where it is used), so it depends on
neither the world size nor on what was drawn before, and a run resumes at any position by naming it. The hash is made
of 64-bit additions, multiplications and shifts only: the same on every machine and with every version of numpy.

Legend: N positions or samples (any shape), B samples of a batch, D blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

BRANCHES = 3
"""Residual branches of a block: attention, Mamba-2, feed-forward."""

GOLDEN = 0x9E3779B97F4A7C15
"""What SplitMix64 moves its state by."""
_ROUNDS = 12
_MASK = 2**64 - 1
T = TypeVar("T")


def hash64(seed: int, stream: str, *counters: ArrayLike) -> U64:
    """64 uniform bits for each element of the broadcast `counters` (integers >= 0); `stream` says what they are for.

    A chain of SplitMix64 steps (Steele, Lea, Flood 2014): each counter picks the element of a stream whose start is
    the hash so far.
    """
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    start = int(_mix(np.array([(seed ^ name) & _MASK], dtype=np.uint64))[0])
    state: U64 = np.array(start, dtype=np.uint64)
    for counter in counters:
        state = _step(state, _as_u64(counter))
    return state


def uniform(seed: int, stream: str, *counters: ArrayLike) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, one for each element of the broadcast `counters`."""
    numbers: NDArray[np.float64] = (hash64(seed, stream, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def permuted(seed: int, epoch: ArrayLike, positions_N: ArrayLike, n: int) -> I64:
    """Which of `n` samples stands at each position of an epoch: a permutation of range(n) for each (seed, epoch).

    A Feistel network on the smallest power of two that holds `n`; values that fall outside walk on along their cycle
    until they are inside (Black and Rogaway 2002), fewer than two rounds on average. The cost of an element does not
    depend on its position. `epoch` is broadcast against the positions, each in [0, n).
    """
    positions = _as_u64(positions_N)
    if n < 1 or (positions.size and int(positions.max()) >= n):
        raise ValueError(f"positions must lie in [0, {n})")
    epochs = np.broadcast_to(_as_u64(epoch), np.broadcast_shapes(np.shape(epoch), positions.shape))
    values = np.array(np.broadcast_to(positions, epochs.shape), dtype=np.uint64)
    flat, flat_epochs = values.reshape(-1), epochs.reshape(-1)
    outside = np.arange(flat.size)
    while outside.size:
        flat[outside] = _feistel(seed, flat_epochs[outside], flat[outside], max(2, (n - 1).bit_length()))
        outside = outside[flat[outside] >= np.uint64(n)]
    return flat.reshape(values.shape).astype(np.int64)


def view_of(epoch_N: ArrayLike, index_N: ArrayLike, views: int) -> I64:
    """Which view of each sample an epoch uses: every view once in `views` epochs, starting anywhere."""
    start = hash64(0, "view", index_N) % np.uint64(views)
    return ((_as_u64(epoch_N) + start) % np.uint64(views)).astype(np.int64)


def label_drop(seed: int, step: int, positions_B: ArrayLike, p: float) -> NDArray[np.bool_]:
    """Which labels become "no class" (for guidance), with probability `p`. Positions are places in the global batch."""
    dropped: NDArray[np.bool_] = uniform(seed, "label_drop", step, positions_B) < p
    return dropped


def drop_path(seed: int, step: int, positions_B: ArrayLike, rates_D: ArrayLike) -> NDArray[np.float32]:
    """Multipliers of the residual branches, (D, BRANCHES, B): 0 with probability `rates_D`, else 1 / (1 - rate)."""
    rates_D11 = np.asarray(rates_D, dtype=np.float64)[:, None, None]
    blocks_D11 = np.arange(len(rates_D11))[:, None, None]
    branches_1G1 = np.arange(BRANCHES)[None, :, None]
    drawn_DGB = uniform(seed, "drop_path", step, positions_B, blocks_D11, branches_1G1)
    kept_D11 = np.maximum(1 - rates_D11, np.finfo(np.float64).tiny)
    multipliers: NDArray[np.float32] = np.where(drawn_DGB < rates_D11, 0.0, 1 / kept_D11).astype(np.float32)
    return multipliers


def _feistel(seed: int, epochs: U64, values: U64, bits: int) -> U64:
    """A permutation of range(2**bits): each round changes one half by a hash of the other, so it can be undone."""
    low_bits = bits // 2
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for number in range(0, _ROUNDS, 2):
        low = low ^ (hash64(seed, "order", epochs, number, high) & low_mask)
        high = high ^ (hash64(seed, "order", epochs, number + 1, low) & high_mask)
    return (high << np.uint64(low_bits)) | low


def _step(state: U64, counter: U64) -> U64:
    # Arrays, never numpy scalars: those warn where 64-bit arithmetic wraps around.
    moved: Any = np.atleast_1d(state) + np.atleast_1d(counter + np.uint64(1)) * np.uint64(GOLDEN)
    return _mix(moved).reshape(np.broadcast_shapes(state.shape, counter.shape))


def _mix(bits: U64) -> U64:
    return finalise(bits, lambda value, places: value >> np.uint64(places), np.uint64)


def finalise(bits: T, shift_right: Callable[[T, int], Any], constant: Callable[[int], Any]) -> T:
    """SplitMix64's finaliser on 64-bit integers of any library: each bit of the result depends on each of `bits`.

    `shift_right` fills with zeros; `constant` makes what `bits` is multiplied by. Multiplying wraps around.
    """
    value: Any = bits
    value = (value ^ shift_right(value, 30)) * constant(0xBF58476D1CE4E5B9)
    value = (value ^ shift_right(value, 27)) * constant(0x94D049BB133111EB)
    mixed: T = value ^ shift_right(value, 31)
    return mixed


def _as_u64(values: ArrayLike) -> U64:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or (array.dtype.kind == "i" and array.size and int(array.min()) < 0):
        raise ValueError(f"counters must be integers >= 0, got {array.dtype} {values!r}"[:200])
    return array.astype(np.uint64)
