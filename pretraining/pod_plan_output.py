"""The plan of a run on a slice, as lines and as JSON."""

import dataclasses
from typing import Any

from pretraining import console
from pretraining.pod_plan import PhaseOnPod, PodPlan
from tpu.chips import GIB
from tpu.plan import MATMUL_EFFICIENCY, STORAGE_BANDWIDTH, Cost, StepTime, storage_seconds


def say(plan: PodPlan) -> None:
    """Prints a plan, what is certain apart from what is expected."""
    where, chip = plan.where, plan.where.chip
    console.say(
        f"Plan for {where.name}: {_counted(where.num_chips, f'{chip.name} chip')} "
        f"({where.compiler_topology}), {_counted(where.num_devices, 'device')} of "
        f"{where.hbm_bytes / GIB:.0f} GiB, {_counted(where.num_hosts, 'host')}"
    )
    for item in plan.phases:
        _say_phase(item)
    size, each = plan.checkpoint_bytes, storage_seconds(plan.checkpoint_bytes)
    console.say(
        f"Checkpoints: {plan.checkpoints} of {_figure(size / 1e9)} GB, {_figure(each)} s each at "
        f"{STORAGE_BANDWIDTH / 1e6:.0f} MB/s (assumed), {_figure(plan.checkpoint_cost.hours)} h in all"
    )
    console.say(f"Expected: {_price(plan.cost)}; at the bound {_price(plan.least_cost)}")
    console.say(
        f"  Expected is with matrix products at {MATMUL_EFFICIENCY:.1%} of the peak, fitted to published "
        "runs of 2019, or at the bound where that is more; MLPerf's TF2 entry of 2020 reached 55% "
        "(docs/tpu.md has all errors). Left out: start, compilation, evaluation, time lost to preemption"
    )


def _say_phase(item: PhaseOnPod) -> None:
    phase, work, bound, expected = item.phase, item.work, item.bound, item.expected
    origin = "as compiled" if item.measured else "from the dimensions"
    console.say(
        f"Phase {phase.number}: {phase.num_train_steps:,} updates of {item.batch.global_batch_size} rows of "
        f"{phase.max_seq_length} tokens, {item.batch.rows_per_replica} a device"
    )
    console.say(
        f"  Work of a device and update, {origin}: {_figure(work.flops / 1e12)} TFLOP, update "
        f"{_figure(work.update_bytes / 1e9)} GB, all-reduce {_figure(work.all_reduce_bytes / 1e9)} GB"
    )
    for name, time in (("bound", bound), ("expected", expected)):
        console.say(
            f"  Update, {name}: {_figure(1e3 * time.total)} ms = forward and backward pass "
            f"{_figure(1e3 * time.compute)} + optimizer {_figure(1e3 * time.update)} + all-reduce "
            f"{_figure(1e3 * time.all_reduce)}"
        )
    console.say(f"  Expected: {_price(item.cost)}; at the bound {_price(item.least_cost)}")
    console.say(
        f"  Input of a host at the bound: {item.input.examples:,.0f} examples/s, "
        f"{_figure(item.input.read_bytes / 1e6)} MB/s read, {_figure(item.input.device_bytes / 1e6)} MB/s "
        "to devices"
    )


def _figure(value: float) -> str:
    """Three digits at least, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _price(what: Cost) -> str:
    text = f"{_figure(what.hours)} h, {_figure(what.chip_hours)} chip hours"
    return text if what.money is None else f"{text}, {what.money:,.2f} in money"


def as_json(plan: PodPlan) -> dict[str, Any]:
    """Returns a plan as JSON has it; units stand in the names, bytes and seconds where none does."""
    phases = []
    for item in plan.phases:
        phases.append(
            {
                "phase": item.phase.number,
                "steps": item.phase.num_train_steps,
                "max_seq_length": item.phase.max_seq_length,
                "global_batch_size": item.batch.global_batch_size,
                "rows_per_device": item.batch.rows_per_replica,
                "work": {
                    **dataclasses.asdict(item.work),
                    "source": "compiler" if item.measured else "dimensions",
                },
                "seconds_bound": _seconds(item.bound),
                "seconds_expected": _seconds(item.expected),
                "expected": dataclasses.asdict(item.cost),
                "bound": dataclasses.asdict(item.least_cost),
                "input_per_host_and_second": dataclasses.asdict(item.input),
            }
        )
    return {
        "slice": plan.where.name,
        "topology": plan.where.compiler_topology,
        "chips": plan.where.num_chips,
        "devices": plan.where.num_devices,
        "hosts": plan.where.num_hosts,
        "matmul_efficiency": MATMUL_EFFICIENCY,
        "price_per_chip_hour": plan.price_per_chip_hour,
        "parameters": plan.parameters,
        "phases": phases,
        "checkpoints": {
            "number": plan.checkpoints,
            "bytes": plan.checkpoint_bytes,
            "seconds": storage_seconds(plan.checkpoint_bytes),
            "expected": dataclasses.asdict(plan.checkpoint_cost),
        },
        "expected": dataclasses.asdict(plan.cost),
        "bound": dataclasses.asdict(plan.least_cost),
    }


def _seconds(time: StepTime) -> dict[str, float]:
    return {**dataclasses.asdict(time), "total": time.total}
