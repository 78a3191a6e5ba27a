"""Independent random streams, each a pure function of a name and some integers."""

import zlib

import numpy as np


def _hash(stream: str, parts: tuple[int, ...], n: int) -> np.ndarray:
    """Return `n` random 32-bit integers.

    The stream name and the number of parts are hashed too, because NumPy's `SeedSequence` ignores
    trailing zeros and would not distinguish (a, b) from (a, b, 0).
    """
    words = [zlib.crc32(stream.encode()), len(parts), *parts]
    return np.random.SeedSequence(words).generate_state(n)


def derived_seed(stream: str, *parts: int) -> int:
    """Return a 32-bit seed, for example for ("weights", seed, block)."""
    return int(_hash(stream, parts, 1)[0])


def derived_uniform(n: int, stream: str, *parts: int) -> list[float]:
    """Return `n` random numbers in [0, 1)."""
    return (_hash(stream, parts, n) / 2**32).tolist()
