"""The phases of a run: parts with one sequence length, one batch and one schedule each.

The step of a run counts through all of them. Which phase a step is in, and how far, follows from the
step alone, so that a restart needs nothing else.
"""

import dataclasses
from collections.abc import Sequence

# Odd, so that the seeds of 2^32 phases differ.
_SEED_STRIDE = 0x9E3779B9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run.

    Attributes:
      number: counts from 1.
      first_step: updates of the phases before it.
      num_train_steps: its own updates.
      max_seq_length: tokens of an example.
      max_predictions_per_seq: masked tokens of an example at most.
      train_batch_size: global batch; 0 to be worked out.
      accumulation_steps: micro-batches of an update on each replica; 0 to be worked out.
    """

    number: int
    first_step: int
    num_train_steps: int
    max_seq_length: int
    max_predictions_per_seq: int
    train_batch_size: int
    accumulation_steps: int

    @property
    def end_step(self) -> int:
        """Updates of the run when the phase is over."""
        return self.first_step + self.num_train_steps

    def __str__(self) -> str:
        return f"Phase {self.number}: {self.max_seq_length} tokens"

    def data_seed(self, seed: int) -> int:
        """Returns the seed of the order and the masks of its records: another one in each phase."""
        return (seed + (self.number - 1) * _SEED_STRIDE) % 2**32


def phase_of(phases: Sequence[Phase], step: int) -> Phase:
    """Returns the phase of the update that follows `step` updates; the last one at the end."""
    return next((phase for phase in phases if step < phase.end_step), phases[-1])


def phase_that_led_to(phases: Sequence[Phase], step: int) -> Phase:
    """Returns the phase of the last one of `step` updates; the first one at step 0."""
    return phase_of(phases, max(0, step - 1))


def is_due(phases: Sequence[Phase], step: int, interval: int) -> bool:
    """Tells whether what is done at every interval, and at the end of a phase, is due at a step."""
    at_end = any(step == phase.end_step for phase in phases)
    return at_end or bool(interval and step % interval == 0)


def next_stop(phase: Phase, step: int, intervals: Sequence[int], others: Sequence[int]) -> int:
    """Returns the next step at which something but training is due.

    Args:
      phase: the phase of the step.
      step: updates made so far.
      intervals: of what is done again and again; 0 for never.
      others: single steps.
    """
    stops = [(step // interval + 1) * interval for interval in intervals if interval]
    return min(stop for stop in (*stops, *others, phase.end_step) if stop > step)
