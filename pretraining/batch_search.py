"""The largest micro-batch that fits into the memory of a device, by trying."""

import bisect
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Trial:
    """A number of rows that was tried.

    Attributes:
      fits: whether the program has enough memory.
      bytes: that it takes.
    """

    fits: bool
    bytes: int


def sizes_of(rows: int) -> list[int]:
    """Returns the micro-batches into which so many rows can be split evenly, in ascending order."""
    return [size for size in range(1, rows + 1) if rows % size == 0]


def largest_that_fits(
    attempt: Callable[[int], Trial], sizes: list[int], first: int, limit: int, fixed: int
) -> int:
    """Returns the largest of some micro-batches that fits, 0 where none does.

    The memory of activations grows with the rows, so a line through the last trial says where to try
    next; but the compiler saves memory when it must, so only a trial decides, and where the line
    leads nowhere new the range is halved.

    Args:
      attempt: compiles for a number of rows.
      sizes: numbers of rows, ascending.
      first: the one to begin with.
      limit: bytes of a device.
      fixed: bytes that do not depend on the rows.
    """
    low, high = -1, len(sizes)  # the largest that fits, the smallest that does not
    guess = bisect.bisect_right(sizes, first) - 1
    while low + 1 < high:
        if not low < guess < high:
            guess = (low + high) // 2
        trial = attempt(sizes[guess])
        low, high = (guess, high) if trial.fits else (low, guess)
        per_row = max(1.0, (trial.bytes - fixed) / sizes[guess])
        guess = bisect.bisect_right(sizes, max(0, limit - fixed) / per_row) - 1
    return sizes[low] if low >= 0 else 0
