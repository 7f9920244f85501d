"""What a supervisor is to do, within which limits, and how it ends."""

import dataclasses

from tpu.cloud_requests import SliceRequest

DONE, FAILED, BAD_INPUT, BUDGET_USED_UP, GAVE_UP = 0, 1, 2, 3, 4
STOP_SECONDS = 120  # for the command to save and end when the budget does
STOP_SHARE = 0.1  # of a small budget


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to keep going, and within which limits.

    Attributes:
      request: the slice.
      command: for worker 0, which drives the slice.
      setup: for all workers, once for each slice; "" for none.
      budget_seconds: for which slices may exist, all of them together.
      max_recreations: how often a slice is made anew.
      timeout: seconds until a slice that was asked for must be ready.
      price_per_hour: of the slice, in any currency; 0 where it is not known.
      adopt: a slice that is there already counts as made by this supervisor, which may delete it.
      keep: leave the slice when the run is over.
    """

    request: SliceRequest
    command: str
    setup: str
    budget_seconds: float
    max_recreations: int
    timeout: float
    price_per_hour: float = 0.0
    adopt: bool = False
    keep: bool = False

    @property
    def stop_seconds(self) -> int:
        """Seconds at the end of the budget in which the command may save and end."""
        return min(STOP_SECONDS, int(STOP_SHARE * self.budget_seconds) + 1)


class Over(Exception):
    """The supervision is over.

    Attributes:
      status: with which the program exits.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
