"""The text of XLA's optimized HLO: its instructions, and what each of them costs."""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call iota after-all".split()
)


class Instruction(NamedTuple):
    """An instruction of a computation.

    Attributes:
      name: unique in its module.
      shape: of the result, such as "f32[8,128]{1,0:T(8,128)}", or a tuple of shapes in parentheses.
      opcode: such as "fusion".
      operands: names of instructions; of a constant its value, of a parameter its number.
      rest: attributes, as text.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str

    def attribute(self, pattern: str) -> str:
        """Returns the first group of a regular expression in the attributes, "" where there is none."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """The computations that it names under these keys."""
        names: list[str] = []
        for key in keys:
            match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest)
            if match:
                names += [n.strip().lstrip("%") for n in (match[1] or match[2]).split(",")]
        return names


Measure = Callable[[Instruction, Callable[[str], str]], float]


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the instructions of each computation by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    steps: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(maxsplit=1)[0].lstrip("%").split("(")[0]
            steps = computations[name] = {}
            entry = name if line.startswith("ENTRY ") else entry
        elif " = " in line and line.startswith(" "):
            step = _instruction(line.strip().removeprefix("ROOT "))
            steps[step.name] = step
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, right = line.partition(" = ")
    end = _closing(right) if right.startswith("(") else right.find(" ") - 1
    shape, right = right[: end + 1], right[end + 2 :]
    opcode, _, right = right.partition("(")
    end = _closing("(" + right) - 1
    inner = re.sub(r"/\*[^*]*\*/", "", right[:end])
    operands = [
        part.strip().split(" ")[-1].lstrip("%") for part in inner.split(",") if part.strip()
    ]
    return Instruction(name.lstrip("%"), shape, opcode, operands, right[end + 1 :])


def _closing(text: str) -> int:
    """Position of the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _arrays(shape: str) -> Iterator[tuple[str, list[int]]]:
    for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        yield dtype, [int(size.lstrip("<=")) for size in sizes.split(",") if size]


def size_of(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays, padding left out."""
    total = 0
    for dtype, sizes in _arrays(shape):
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        total += math.prod(sizes) * bits // 8
    return total


def cycles(step: Instruction, _: Callable[[str], str] = str) -> float:
    """Returns the compiler's estimate of clock cycles; 0 for collectives and what takes none."""
    return float(step.attribute(r'"estimated_cycles":"(\d+)"') or 0)


def traffic(step: Instruction, shape_of: Callable[[str], str]) -> float:
    """Returns the bytes that an instruction reads and writes.

    Args:
      step: the instruction.
      shape_of: returns the shape of an operand, by name.
    """
    if step.opcode in _FREE or step.opcode.endswith("-done"):
        return 0.0
    return size_of(step.shape) + sum(size_of(shape_of(name)) for name in step.operands)


def matmul_flops(step: Instruction, shape_of: Callable[[str], str]) -> float:
    """Returns the FLOPs of a product of floating-point matrices; 0 for other instructions.

    Args:
      step: the instruction.
      shape_of: returns the shape of an operand, by name.
    """
    if step.shape.startswith(("u", "s", "pred")):  # a gather from a small table
        return 0.0
    if step.opcode == "dot":
        ((_, output),), ((_, left),) = _arrays(step.shape), _arrays(shape_of(step.operands[0]))
        contracted = step.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        depth = math.prod(left[int(i)] for i in contracted.split(",") if i)
        return 2.0 * math.prod(output) * depth
    if step.opcode == "convolution":
        return _convolution_flops(step, shape_of)
    return 0.0


def _convolution_flops(step: Instruction, shape_of: Callable[[str], str]) -> float:
    """Counts, as XLA does, only places of the window that meet an element that is there."""
    ((_, output),) = _arrays(step.shape)
    ((_, image),), ((_, kernel),) = (_arrays(shape_of(name)) for name in step.operands[:2])
    of_image, of_kernel, of_output = re.split(r"_|->", step.attribute(r"dim_labels=([\w\->]+)"))
    groups = int(step.attribute(r"batch_group_count=(\d+)") or 1)
    outer = output[of_output.index("b")] * output[of_output.index("f")]
    depth = kernel[of_kernel.index("i")]
    spatial = [label for label in of_output if label.isdigit()]
    window = step.attribute(r"window=\{([^}]*)\}")
    pairs = 1
    for label in spatial:
        at = int(label)
        pairs *= _valid_pairs(
            image[of_image.index(label)],
            kernel[of_kernel.index(label)],
            output[of_output.index(label)],
            *(_window(window, key, at) for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")),
        )
    return 2.0 * outer * depth * pairs / groups


def _window(window: str, key: str, at: int) -> int:
    """One number of a window such as "size=4x4 pad=3_3x3_3"; of a padding that before."""
    match = re.search(rf"\b{key}=(\S+)", window)
    if not match:
        return 0 if key == "pad" else 1
    return int(match[1].split("x")[at].split("_")[0])


def _valid_pairs(
    image: int, kernel: int, output: int, stride: int, pad: int, spread: int, dilation: int
) -> int:
    """Pairs of an output and a place of the window at which the image has an element."""
    last = (image - 1) * spread
    count = 0
    for k in range(kernel):
        shift = k * dilation - pad
        if spread == 1:
            first = max(0, math.ceil(-shift / stride))
            end = min(output - 1, (last - shift) // stride)
            count += max(0, end - first + 1)
        else:
            count += sum(
                0 <= (at := o * stride + shift) <= last and at % spread == 0 for o in range(output)
            )
    return count
