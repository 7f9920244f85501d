"""Batch arithmetic, written out once: global = per replica x replicas x accumulation."""

import dataclasses

from pretraining.errors import InputError
from pretraining.phases import Phase

ROWS_PER_REPLICA = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is spread.

    Attributes:
      global_batch_size: rows of one update.
      num_replicas: replicas that share them.
      accumulation_steps: micro-batches on each replica.
    """

    global_batch_size: int
    num_replicas: int
    accumulation_steps: int = 1

    @property
    def per_replica_batch_size(self) -> int:
        """Rows of one micro-batch on one replica."""
        return self.global_batch_size // (self.num_replicas * self.accumulation_steps)

    @property
    def rows_per_replica(self) -> int:
        """Rows of one update on one replica."""
        return self.global_batch_size // self.num_replicas

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} = {self.per_replica_batch_size} rows x "
            f"{_counted(self.num_replicas, 'replica')} x "
            f"{_counted(self.accumulation_steps, 'micro-batch', 'micro-batches')}"
        )


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def plan_training(phase: Phase, num_replicas: int, rows_that_fit: int) -> BatchPlan:
    """Works out the batches of a phase.

    Args:
      phase: its global batch, and micro-batches where they are given.
      num_replicas: replicas that share a batch.
      rows_that_fit: rows of a micro-batch that fit into a replica's memory.

    Raises:
      InputError: the global batch does not divide by replicas and micro-batches.
    """
    size = phase.train_batch_size or ROWS_PER_REPLICA * num_replicas * (
        phase.accumulation_steps or 1
    )
    if size % (num_replicas * max(1, phase.accumulation_steps)):
        accumulation = (
            f" x {phase.accumulation_steps} accumulation steps = "
            f"{num_replicas * phase.accumulation_steps}"
            if phase.accumulation_steps
            else ""
        )
        raise InputError(
            f"--train_batch_size={size}: expected a multiple of {num_replicas} replicas{accumulation}"
        )
    rows = size // num_replicas
    fitting = (d for d in range(-(-rows // rows_that_fit), rows + 1) if rows % d == 0)
    return BatchPlan(
        global_batch_size=size,
        num_replicas=num_replicas,
        accumulation_steps=phase.accumulation_steps or next(fitting, rows),
    )


def plan_evaluation(eval_batch_size: int, training: BatchPlan) -> BatchPlan:
    """Works out the batches of evaluation, a micro-batch of training where none are asked for.

    Raises:
      InputError: the global batch does not divide by the replicas.
    """
    size = eval_batch_size or training.per_replica_batch_size * training.num_replicas
    if size % training.num_replicas:
        raise InputError(
            f"--eval_batch_size={size}: expected a multiple of {training.num_replicas} replicas"
        )
    return BatchPlan(global_batch_size=size, num_replicas=training.num_replicas)
