"""What a run on a slice takes: step time, hours, money, what hosts must deliver, checkpoints.

Arithmetic alone: a step is matrix products, then the all-reduce of the gradient, then the
optimizer's update, one after the other. Two step times come of it, never to be mixed up:

- the bound: every unit at its peak (roofline). Only a program that overlaps the parts can be faster.
- the expected time: the matrix products at `MATMUL_EFFICIENCY` of their peak, the one constant here.
  It was fitted on half of ten published runs; benchmarks/published_runs.py shows the error on all.
"""

import dataclasses

from tpu.chips import Slice

# Share of the peak that the matrix products of a whole training step reach: the least squares of
# the logarithm of predicted over published time, over every second row of
# benchmarks/published_runs.py. These are runs of BERT-Large, most of them of 2019.
MATMUL_EFFICIENCY = 0.2877

# Bytes/s that one process writes to Google Cloud Storage. From memory, an order of magnitude.
STORAGE_BANDWIDTH = 100e6

SECONDS_PER_HOUR = 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one update asks of one device.

    Attributes:
      flops: of its matrix products, over all micro-batches.
      update_bytes: that the optimizer's update moves between the device and its memory.
      all_reduce_bytes: size of what is summed over all devices, the gradient as a rule.
    """

    flops: float
    update_bytes: float
    all_reduce_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Where the time of one update goes, seconds.

    Attributes:
      compute: matrix products of forward and backward pass.
      update: the optimizer.
      all_reduce: the sum of the gradients over all chips.
    """

    compute: float
    update: float
    all_reduce: float

    @property
    def total(self) -> float:
        """One after the other, seconds."""
        return self.compute + self.update + self.all_reduce


def step_time(work: StepWork, where: Slice, *, efficiency: float = MATMUL_EFFICIENCY) -> StepTime:
    """Returns the time to be expected for an update.

    An all-reduce over n chips sends 2 (n - 1) / n times its size from each of them. The cores of a
    chip share its memory and its links: their sum is taken to cost nothing beside that.

    Args:
      work: of one device.
      where: the slice that all devices belong to.
      efficiency: share of the peak that matrix products reach, in (0, 1].

    Raises:
      ValueError: `efficiency` is no such share.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be in (0, 1]. Received: efficiency={efficiency}")
    chip, chips = where.chip, where.num_chips
    sent = 2 * (chips - 1) / chips * work.all_reduce_bytes
    return StepTime(
        compute=chip.devices * work.flops / (efficiency * chip.peak_flops),
        update=chip.devices * work.update_bytes / chip.hbm_bandwidth,
        all_reduce=sent / where.used_ici_bandwidth if sent else 0.0,
    )


def step_bound(work: StepWork, where: Slice) -> StepTime:
    """Returns the roofline: every part at its peak, one after the other."""
    return step_time(work, where, efficiency=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What some time on a slice costs.

    Attributes:
      hours: by the clock.
      chip_hours: hours times chips, which are paid.
      money: chip hours times the price, in its currency; None without a price.
    """

    hours: float
    chip_hours: float
    money: float | None

    def __add__(self, other: "Cost") -> "Cost":
        priced = self.money is not None and other.money is not None
        money = (self.money or 0.0) + (other.money or 0.0) if priced else None
        return Cost(
            hours=self.hours + other.hours,
            chip_hours=self.chip_hours + other.chip_hours,
            money=money,
        )


def cost(seconds: float, where: Slice, price_per_chip_hour: float | None = None) -> Cost:
    """Returns what it costs to hold a slice.

    Args:
      seconds: how long.
      where: the slice.
      price_per_chip_hour: what Google asks for a chip and an hour, in any currency.
    """
    hours = seconds / SECONDS_PER_HOUR
    chip_hours = hours * where.num_chips
    money = None if price_per_chip_hour is None else chip_hours * price_per_chip_hour
    return Cost(hours=hours, chip_hours=chip_hours, money=money)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputRate:
    """What every host must deliver to its chips so that none of them waits.

    Attributes:
      examples: a second.
      read_bytes: a second, of records as they are stored.
      device_bytes: a second, of batches as they go to the devices.
    """

    examples: float
    read_bytes: float
    device_bytes: float


def input_rate(
    global_batch_size: int,
    seconds: float,
    where: Slice,
    *,
    record_bytes: float,
    row_bytes: float,
) -> InputRate:
    """Returns what a host must deliver; each one serves the devices of its own machine.

    Args:
      global_batch_size: examples of an update.
      seconds: time of an update. The bound gives the rate that is always enough.
      where: the slice.
      record_bytes: size of an example as it is stored.
      row_bytes: size of an example on the device.
    """
    examples = global_batch_size / where.num_hosts / seconds
    return InputRate(
        examples=examples,
        read_bytes=examples * record_bytes,
        device_bytes=examples * row_bytes,
    )


def storage_seconds(size: float, bandwidth: float = STORAGE_BANDWIDTH) -> float:
    """Returns how long one process writes a checkpoint.

    Args:
      size: bytes.
      bandwidth: bytes/s.
    """
    return size / bandwidth
