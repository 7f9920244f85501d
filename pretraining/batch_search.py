"""The largest micro-batch that fits into the memory of a device, by trying."""

import dataclasses
from collections.abc import Callable

TILE_ROWS = 8  # a TPU's memory is laid out in tiles of 8 rows
MOST_ROWS = 2**14


@dataclasses.dataclass(frozen=True)
class Trial:
    """A number of rows that was tried.

    Attributes:
      fits: whether the program has enough memory.
      bytes: that it takes.
    """

    fits: bool
    bytes: int


def largest_that_fits(attempt: Callable[[int], Trial], first: int, limit: int, fixed: int) -> int:
    """Returns the largest number of rows that fits, up to 8 any, above that a multiple of 8.

    The memory of activations grows with the rows, so a line through what was tried says where to try
    next; but the compiler saves memory when it must, so only a trial decides.

    Args:
      attempt: compiles for a number of rows.
      first: the number to begin with, tried already perhaps.
      limit: bytes of a device.
      fixed: bytes that do not depend on the rows.

    Returns:
      The rows, 0 where not even one fits; at most `MOST_ROWS`.
    """
    low, high = 0, _next(MOST_ROWS)  # fits, does not fit
    guess, crawling = _snap(first), False
    while _next(low) < high:
        guess = min(max(guess, _next(low)), _before(high))
        trial = attempt(guess)
        low, high = (guess, high) if trial.fits else (low, guess)
        per_row = max(1.0, (trial.bytes - fixed) / guess)
        guess = _snap(int(max(0, limit - fixed) / per_row))
        if low < guess < high:
            crawling = False
        elif crawling:  # the line leads nowhere: halves, or twice where nothing has failed yet
            guess = _snap(2 * low if high > MOST_ROWS else (low + high) // 2)
        else:  # most often the answer is where it was tried last
            guess, crawling = (_next(low) if trial.fits else _before(high)), True
    return low


def _snap(rows: int) -> int:
    return rows if rows < TILE_ROWS else min(MOST_ROWS, rows // TILE_ROWS * TILE_ROWS)


def _next(rows: int) -> int:
    return rows + (1 if rows < TILE_ROWS else TILE_ROWS)


def _before(rows: int) -> int:
    return rows - (1 if rows <= TILE_ROWS else TILE_ROWS)
