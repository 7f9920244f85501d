"""The plan of a run on a slice that is not held yet: steps, hours, money, input, checkpoints."""

import dataclasses
from collections.abc import Mapping

from pretraining import model_flops
from pretraining.batch_plan import BatchPlan
from pretraining.config import Config
from pretraining.model import BertConfig
from pretraining.phases import Phase
from pretraining.run_plan import SLOTS, plan_phases, saved_steps
from tpu.chips import Slice
from tpu.plan import (
    Cost,
    InputRate,
    StepTime,
    StepWork,
    cost,
    input_rate,
    step_bound,
    step_time,
    storage_seconds,
)

FLOAT32_BYTES = 4
# Bytes that an update moves for a float32 parameter: it reads parameter, gradient and slots and writes
# parameter and slots; where the step waits for the norms of a layer it reads all but the gradient again.
# The TPU's compiler reaches each of them (benchmarks/update_cost.py).
UPDATE_BYTES = {"lamb": 40, "lars": 28, "adamw": 28, "adam": 28, "momentum": 20, "adagrad": 20}
# An example as google-research/bert stores it: for a token its id, a byte in the mask and one in the
# segments; for a prediction place, id and float32 weight. Small numbers take a byte, ids two or three.
TOKEN_BYTES, PREDICTION_BYTES, RECORD_OVERHEAD_BYTES = 4.2, 8, 250
DEVICE_BYTES = 4  # all features go to the device as int32 or float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseOnPod:
    """A phase on the slice.

    Attributes:
      phase: its lengths and steps.
      batch: how its global batch is spread.
      work: of one device and update.
      measured: whether `work` is the compiler's account; else it follows from the dimensions.
      bound: the time of an update at its best, one part after the other.
      expected: the time of an update.
      cost: of all its updates, by `expected`.
      least_cost: of all its updates, by `bound`.
      input: what every host must deliver, by `bound`.
    """

    phase: Phase
    batch: BatchPlan
    work: StepWork
    measured: bool
    bound: StepTime
    expected: StepTime
    cost: Cost
    least_cost: Cost
    input: InputRate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodPlan:
    """A run on the slice.

    Attributes:
      where: the slice.
      phases: in order.
      price_per_chip_hour: None where it is not known.
      parameters: that are trained.
      checkpoint_bytes: of one checkpoint.
      checkpoints: how many are written.
      checkpoint_cost: of the time in which they are written and training waits.
    """

    where: Slice
    phases: tuple[PhaseOnPod, ...]
    price_per_chip_hour: float | None
    parameters: int
    checkpoint_bytes: int
    checkpoints: int
    checkpoint_cost: Cost

    @property
    def cost(self) -> Cost:
        """Of all phases and checkpoints, as expected."""
        return _sum([phase.cost for phase in self.phases]) + self.checkpoint_cost

    @property
    def least_cost(self) -> Cost:
        """Of all phases at their bound."""
        return _sum([phase.least_cost for phase in self.phases])


def plan_pod(
    config: Config,
    bert: BertConfig,
    vocab_size: int,
    where: Slice,
    *,
    batches: Mapping[int, BatchPlan] | None = None,
    price_per_chip_hour: float | None = None,
    measured: Mapping[int, StepWork] | None = None,
    bounds: Mapping[int, StepTime] | None = None,
) -> PodPlan:
    """Plans a run.

    Args:
      config: the flags.
      bert: the dimensions.
      vocab_size: width of the masked-LM logits.
      where: the slice.
      batches: how the global batches are spread, by number of the phase; worked out where not given.
      price_per_chip_hour: in any currency.
      measured: what the compiler says of an update on one device, by number of the phase.
      bounds: the compiler's own lower bounds, likewise; those of the roofline where not given.

    Raises:
      InputError: a global batch does not divide by the devices of the slice.
    """
    parameters = model_flops.parameter_count(bert, vocab_size)
    phases = []
    for planned in plan_phases(config, where.num_devices, where.hbm_bytes, bert, vocab_size):
        phase = planned.phase
        batch = (batches or {}).get(phase.number, planned.train)
        compiled = (measured or {}).get(phase.number)
        work = compiled or step_work(phase, batch, bert, vocab_size, config.optimizer)
        bound = (bounds or {}).get(phase.number) or step_bound(work, where)
        phases.append(
            _plan_phase(phase, batch, work, bound, compiled is not None, where, price_per_chip_hour)
        )
    size = FLOAT32_BYTES * parameters * (1 + SLOTS[config.optimizer])
    saves = len(saved_steps(config))
    return PodPlan(
        where=where,
        phases=tuple(phases),
        price_per_chip_hour=price_per_chip_hour,
        parameters=parameters,
        checkpoint_bytes=size,
        checkpoints=saves,
        checkpoint_cost=cost(saves * storage_seconds(size), where, price_per_chip_hour),
    )


def step_work(
    phase: Phase, batch: BatchPlan, bert: BertConfig, vocab_size: int, optimizer: str
) -> StepWork:
    """Returns what an update asks of one device, from the dimensions alone.

    Rows count as full: a TPU computes the padding too, and every place for a prediction.

    Args:
      phase: its lengths.
      batch: how the global batch is spread.
      bert: the dimensions.
      vocab_size: width of the masked-LM logits.
      optimizer: its name.
    """
    rows, length = batch.rows_per_replica, phase.max_seq_length
    parameters = model_flops.parameter_count(bert, vocab_size)
    flops = model_flops.flops(
        bert,
        vocab_size,
        tokens=rows * length,
        token_pairs=rows * length**2,
        predictions=rows * phase.max_predictions_per_seq,
        rows=rows,
    )
    return StepWork(
        flops=flops,
        update_bytes=UPDATE_BYTES[optimizer] * parameters,
        all_reduce_bytes=FLOAT32_BYTES * parameters,
    )


def _plan_phase(
    phase: Phase,
    batch: BatchPlan,
    work: StepWork,
    bound: StepTime,
    measured: bool,
    where: Slice,
    price: float | None,
) -> PhaseOnPod:
    by_runs = step_time(work, where)
    expected = StepTime(
        compute=max(bound.compute, by_runs.compute),
        update=max(bound.update, by_runs.update),
        all_reduce=max(bound.all_reduce, by_runs.all_reduce),
    )
    return PhaseOnPod(
        phase=phase,
        batch=batch,
        work=work,
        measured=measured,
        bound=bound,
        expected=expected,
        cost=cost(phase.num_train_steps * expected.total, where, price),
        least_cost=cost(phase.num_train_steps * bound.total, where, price),
        input=input_rate(
            batch.global_batch_size,
            bound.total,
            where,
            record_bytes=_record_bytes(phase),
            row_bytes=_row_bytes(phase),
        ),
    )


def _record_bytes(phase: Phase) -> float:
    tokens, predictions = phase.max_seq_length, phase.max_predictions_per_seq
    return TOKEN_BYTES * tokens + PREDICTION_BYTES * predictions + RECORD_OVERHEAD_BYTES


def _row_bytes(phase: Phase) -> float:
    return DEVICE_BYTES * (3 * phase.max_seq_length + 3 * phase.max_predictions_per_seq + 1)


def _sum(costs: list[Cost]) -> Cost:
    total = costs[0]
    for other in costs[1:]:
        total += other
    return total
