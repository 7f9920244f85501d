"""What a compiled TPU program says about itself: memory, arithmetic, cycles, collectives.

The text of XLA's optimized HLO is read once. A loop's body counts as often as it runs, which XLA's own
cost analysis leaves out, and of the branches of a conditional the dearer one counts.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from tpu import hlo
from tpu.hlo import Instruction, Measure

_REDUCTIONS = ("all-reduce", "all-reduce-start", "reduce-scatter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a device that a program takes, in bytes.

    Attributes:
      arguments: what goes in, variables and inputs.
      outputs: what comes out.
      aliases: outputs that are written over arguments, in place.
      temporaries: what is held in between, at most.
      code: the program.
    """

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.arguments + self.outputs - self.aliases + self.temporaries + self.code


class AllReduce(NamedTuple):
    """A sum over devices.

    Attributes:
      size: bytes of what each device adds, in the dtype of the sum.
      devices: how many take part in the largest group; 0 for all of them.
      times: how often it is made when the program runs once.
    """

    size: int
    devices: int
    times: float


class Program:
    """A program that the TPU compiler made.

    Attributes:
      text: the optimized HLO.
      memory: of a device.
      flops: XLA's count of all operations, loops multiplied out.
      bytes_accessed: XLA's count of bytes read and written in memory, loops multiplied out.
    """

    def __init__(self, text: str, *, memory: Memory, flops: float, bytes_accessed: float):
        self.text = text
        self.memory = memory
        self._computations, self._entry = hlo.parse(text)
        self._fused: set[str] = set()
        self._times = self._executions()
        # Instructions within a fusion are scheduled, and move data, as one.
        self._scheduled = {n: times for n, times in self._times.items() if n not in self._fused}
        # XLA's own figures count a loop's body once.
        self.flops = flops + self._sum(hlo.matmul_flops, _again(self._times))
        self.bytes_accessed = bytes_accessed + self._sum(hlo.traffic, _again(self._scheduled))

    @property
    def matmul_flops(self) -> float:
        """FLOPs of the products of floating-point matrices; a multiplication with an addition is two."""
        return self._sum(hlo.matmul_flops, self._times)

    @functools.cached_property
    def all_reduces(self) -> list[AllReduce]:
        """The sums over devices."""
        return [
            AllReduce(self._summed_bytes(name, step), _largest_group(step), times)
            for name, times in self._times.items()
            for step in self._computations[name].values()
            if step.opcode in _REDUCTIONS
        ]

    def _summed_bytes(self, computation: str, step: Instruction) -> int:
        """Of what goes in or, where bfloat16 is summed in float32, of what comes out."""
        steps = self._computations[computation]
        given = sum(hlo.size_of(steps[name].shape) for name in step.operands)
        return max(given, hlo.size_of(step.shape))

    def cycles(self, of: str = "") -> float:
        """Returns the compiler's estimate of the clock cycles of all instructions but collectives.

        Args:
          of: a regular expression; only instructions that TensorFlow's operations of such names led to
            are counted.
        """
        return self._sum(hlo.cycles, self._scheduled, of)

    def traffic(self, of: str = "") -> float:
        """Returns the bytes that instructions read and write, an operand counted whole.

        Args:
          of: as in `cycles`.
        """
        return self._sum(hlo.traffic, self._scheduled, of)

    @property
    def in_place_sizes(self) -> list[int]:
        """Bytes of each argument whose memory an output is written to, padding left out."""
        size = {
            int(step.operands[0]): hlo.size_of(step.shape)
            for step in self._computations[self._entry].values()
            if step.opcode == "parameter"
        }
        return [size[argument] for _, argument in self.in_place()]

    def in_place(self) -> list[tuple[int, int]]:
        """Returns the pairs (output, argument) that share their memory."""
        header = self.text[: self.text.find("entry_computation_layout")]
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}, m(?:ay|ust)-alias\)", header)
        return [(int(output or 0), int(argument)) for output, argument in pairs]

    def _sum(self, measure: Measure, times: dict[str, float], of: str = "") -> float:
        """Sums over the instructions of computations that run so often."""
        wanted, total = re.compile(of), 0.0
        for name, often in times.items():
            steps = self._computations[name]

            def shape_of(operand: str, steps: dict[str, Instruction] = steps) -> str:
                return steps[operand].shape if operand in steps else ""

            for step in steps.values():
                if not of or wanted.search(step.attribute(r'op_name="([^"]*)"')):
                    total += often * measure(step, shape_of)
        return total

    def _executions(self) -> dict[str, float]:
        """How often each computation runs; the dearer branch of a conditional, the other not at all."""
        times: dict[str, float] = {}

        def enter(name: str, often: float) -> None:
            times[name] = times.get(name, 0.0) + often
            for step in self._computations[name].values():
                for child, share in self._children(step):
                    enter(child, often * share)

        enter(self._entry, 1.0)
        return times

    def _children(self, step: Instruction) -> Iterator[tuple[str, float]]:
        if step.opcode == "while":
            (body,), (condition,) = step.called("body"), step.called("condition")
            yield body, self._trips(step, condition)
        elif step.opcode == "conditional":
            branches = step.called("branch_computations", "true_computation", "false_computation")
            yield max(branches, key=self._weight), 1.0
        else:
            for name in step.called("calls", "called_computations"):
                if name in self._computations:
                    if step.opcode == "fusion":
                        self._fused.add(name)
                    yield name, 1.0

    def _weight(self, name: str) -> float:
        return sum(hlo.cycles(step) for step in self._computations[name].values())

    def _trips(self, loop: Instruction, condition: str) -> float:
        """How often a loop runs: until a counter from 0 reaches a constant."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return float(known)
        steps = self._computations[condition]
        for step in steps.values():
            if step.opcode == "compare" and "direction=LT" in step.rest:
                limits = [steps[name] for name in step.operands if name in steps]
                for limit in limits:
                    if limit.opcode == "constant" and limit.operands:
                        return float(limit.operands[0])
        return 1.0


def _again(times: dict[str, float]) -> dict[str, float]:
    return {name: often - 1.0 for name, often in times.items() if often > 1.0}


def _largest_group(step: Instruction) -> int:
    iota = step.attribute(r"replica_groups=\[\d+,(\d+)\]<=")
    if iota:
        return int(iota)
    groups = step.attribute(r"replica_groups=\{(\{[\d,{}]*\})\}")
    return max((len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", groups)), default=0)
