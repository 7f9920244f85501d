"""What a training step will be on a slice that nobody holds yet, as its compiler sees it.

The step is any TensorFlow function; what the report says of it is read from the compiled program.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tpu.chips import GIB, Slice
from tpu.compiler import CompileError, OutOfMemoryError, compile_hlo, lower, topology_devices
from tpu.plan import StepTime, StepWork, step_bound
from tpu.program import AllReduce, Program


class StepError(CompileError):
    """The program compiles, but is not what a training step has to be; the text is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """A compiled training step.

    Attributes:
      where: the slice.
      program: what each of its devices runs.
      state_sizes: bytes of each variable that the step must update in place; it may assign more.
      model_flops: of one device and update, from the model's definition.
      update_scope: a regular expression for the names of the optimizer's operations.
    """

    where: Slice
    program: Program
    state_sizes: tuple[int, ...]
    model_flops: float
    update_scope: str

    @functools.cached_property
    def in_place_bytes(self) -> int:
        """Bytes of the variables that are written over their old values."""
        return sum(self.state_sizes) - sum(self._copied.elements())

    @property
    def _copied(self) -> collections.Counter[int]:
        """Sizes of variables for which no argument of that size is written over."""
        return collections.Counter(self.state_sizes) - collections.Counter(
            self.program.in_place_sizes
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of the variables that the step must update in place."""
        return sum(self.state_sizes)

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the compiled matrix products over those of the model's definition."""
        return self.program.matmul_flops / self.model_flops

    @property
    def work(self) -> StepWork:
        """What one update asks of one device."""
        return StepWork(
            flops=self.program.matmul_flops,
            update_bytes=self.program.traffic(self.update_scope),
            all_reduce_bytes=sum(each.size * each.times for each in self.program.all_reduces),
        )

    @property
    def compiler_seconds(self) -> float:
        """The compiler's estimate of all instructions but the collectives, seconds."""
        return self.program.cycles() / self.where.chip.clock

    @property
    def update_seconds(self) -> float:
        """The part of `compiler_seconds` that the optimizer takes."""
        return self.program.cycles(self.update_scope) / self.where.chip.clock

    @property
    def bound(self) -> StepTime:
        """The time of this program at its best: the larger of roofline and compiler's estimate.

        One part follows the other, as in the program: its sums over devices do not overlap the rest.
        """
        roofline = step_bound(self.work, self.where)
        rest = self.compiler_seconds - self.update_seconds
        return StepTime(
            compute=max(roofline.compute, rest),
            update=max(roofline.update, self.update_seconds),
            all_reduce=roofline.all_reduce,
        )

    def check(self) -> None:
        """Checks what every data-parallel training step must be.

        Raises:
          OutOfMemoryError: it does not fit.
          StepError: it copies its variables, or sums gradients not at all, not over all devices or more
            than once.
        """
        memory, program = self.program.memory, self.program
        if memory.total > self.where.hbm_bytes:
            raise OutOfMemoryError(
                f"it does not fit: {memory.total / GIB:.2f} GiB where a device of {self.where.name} has "
                f"{self.where.hbm_bytes / GIB:.2f} GiB",
                memory.total,
                self.where.hbm_bytes,
            )
        if self._copied:
            raise StepError(
                f"expected all {self.state_bytes:,} bytes of variables to be updated in place. Received: "
                f"{self.in_place_bytes:,}"
            )
        if self.where.num_devices == 1:
            return
        partial = [r for r in program.all_reduces if r.devices not in (0, self.where.num_devices)]
        repeated = [r for r in program.all_reduces if r.times != 1]
        if not program.all_reduces or partial or repeated:
            raise StepError(
                f"expected each sum over devices once, over all {self.where.num_devices}. Received: "
                f"{_describe((partial or repeated)[:3]) or 'none'}"
            )

    def as_json(self) -> dict[str, Any]:
        """Returns the report; units stand in the names."""
        program, memory = self.program, self.program.memory
        return {
            "memory_bytes": {
                **dataclasses.asdict(memory),
                "total": memory.total,
                "of_a_device": self.where.hbm_bytes,
            },
            "variables_bytes": self.state_bytes,
            "variables_in_place_bytes": self.in_place_bytes,
            "flops": {
                "matrix_products": program.matmul_flops,
                "model": self.model_flops,
                "ratio": self.flops_ratio,
                "all_operations": program.flops,
            },
            "bytes_accessed": program.bytes_accessed,
            "work": dataclasses.asdict(self.work),
            "seconds": {
                "lower_bound": self.bound.total,
                "compiler_estimate": self.compiler_seconds,
                "optimizer": self.update_seconds,
                "all_reduce": self.bound.all_reduce,
            },
            "all_reduces": [
                {
                    "bytes": each.size,
                    "devices": each.devices or self.where.num_devices,
                    "times": each.times,
                }
                for each in program.all_reduces
            ],
        }

    def lines(self) -> list[str]:
        """Returns the report as text."""
        memory, program = self.program.memory, self.program
        bound = self.bound
        total = bound.total
        return [
            f"Memory: {_gib(memory.total)} of {_gib(self.where.hbm_bytes)} GiB a device: "
            f"{_gib(memory.arguments)} variables and input, {_gib(memory.temporaries)} temporaries, "
            f"{_gib(memory.code)} program, {_gib(memory.outputs - memory.aliases)} output",
            f"In place: {self.in_place_bytes:,} of {self.state_bytes:,} bytes of variables",
            f"Arithmetic of a device and update: {program.matmul_flops / 1e12:.4g} TFLOP in matrix products, "
            f"{self.flops_ratio:.2%} of the model's {self.model_flops / 1e12:.4g}; "
            f"{program.bytes_accessed / 1e9:.3g} GB accessed",
            f"Sums over devices: {_describe(program.all_reduces) or 'none'}",
            f"Update, bound: {1e3 * total:.4g} ms: forward and backward pass {1e3 * bound.compute:.4g}, "
            f"optimizer {1e3 * bound.update:.3g} ({bound.update / total:.1%}), "
            f"all-reduce {1e3 * bound.all_reduce:.3g} ({bound.all_reduce / total:.1%})",
        ]


def _gib(size: int) -> str:
    return f"{round(size / GIB, 4):.3g}"


def _describe(sums: Sequence[AllReduce]) -> str:
    """One part for all sums over as many devices that are made as often."""
    kinds = dict.fromkeys((each.devices, each.times) for each in sums)
    alike = {
        kind: [each.size for each in sums if (each.devices, each.times) == kind] for kind in kinds
    }
    return "; ".join(
        f"{sum(sizes):,} bytes in {len(sizes)} over {devices or 'all'} devices, "
        f"{'once' if times == 1 else f'{times:g} times'} an update"
        for (devices, times), sizes in alike.items()
    )


def preflight(
    step: Callable,
    arguments: Sequence[tf.TensorSpec],
    where: Slice,
    *,
    variables: Sequence[tf.Variable],
    model_flops: float,
    update_scope: str,
) -> Callable[[], StepReport]:
    """Lowers a training step now, and compiles it for a slice when the result is called.

    The result needs TensorFlow no more, so that several can be called at once, in threads.

    Args:
      step: takes `arguments`, the part of the global batch that belongs to one device; sums over devices
        are made by `compiler.cross_replica_sum`.
      arguments: their shapes and dtypes.
      where: the slice.
      variables: that the step assigns.
      model_flops: of one device and update, from the model's definition.
      update_scope: a regular expression for the names of the optimizer's operations.

    Returns:
      A function that returns the report, or raises CompileError: see `compiler.compile_hlo` and
      `StepReport.check`.

    Raises:
      CompileError: the step holds an operation that TPUs lack, or there is no compiler.
    """
    topology_devices(where)  # before the step is traced, which may take longer
    hlo = lower(step, arguments)
    sizes = tuple(v.shape.num_elements() * v.dtype.size for v in variables)

    def compiled() -> StepReport:
        try:
            program = compile_hlo(hlo, where)
        except OutOfMemoryError as error:
            # What the compiler counts are temporaries; the variables come on top of them.
            raise OutOfMemoryError(
                f"{error}, and variables take {sum(sizes) / GIB:.2f} GiB beside them",
                error.needed + sum(sizes),
                error.available,
            ) from None
        report = StepReport(
            where=where,
            program=program,
            state_sizes=sizes,
            model_flops=model_flops,
            update_scope=update_scope,
        )
        report.check()
        return report

    return compiled
