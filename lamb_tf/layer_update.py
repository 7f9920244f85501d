"""The update of one variable as it is stored, and of several in one XLA program.

XLA compiles a program of up to `PROGRAM_VARIABLES` variables of one shape, once for each shape: a
model repeats few shapes, so this takes seconds where one program for the whole model takes half a
minute, and its steps are as fast.
"""

import dataclasses
import functools
import platform
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from lamb_tf.precision import compute_dtype, is_low, narrow, widen
from lamb_tf.settings import LayerwiseSettings
from lamb_tf.update_rule import sum_of_squares

# Beyond four the steps hardly gain, but compilation takes longer. Small variables gain nothing.
PROGRAM_VARIABLES = 4
LARGE = 65536


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the update of a variable depends on, beside tensors; hashable.

    Attributes:
      rule: `lamb_update` or `lars_update`.
      settings: without exclusions.
      decayed: whether weight decay applies.
      adapted: whether the trust ratio applies.
      residual: whether the last of the stored tensors is a rounding residual.
      record: whether the statistics are wanted.
      on_cpu: whether the variable lies on a CPU.
    """

    rule: Callable
    settings: LayerwiseSettings
    decayed: bool
    adapted: bool
    residual: bool
    record: bool
    on_cpu: bool


def sum_of_squares_on_cpu(x: tf.Tensor) -> tf.Tensor:
    """Returns the sum over the squares of all elements, a scalar, for XLA on a CPU.

    XLA adds up a whole tensor element by element there. Rows added to one another, and the dot
    products of the result's rows with ones, use vector instructions: two to three times as fast.
    Sums stay short, a few thousand terms, for the sake of the last digits.
    """
    size = x.shape.num_elements()
    strip = size // 8
    rows = max((d for d in range(1, 1025) if strip % d == 0), default=1)
    if size % 8 or size < LARGE or strip // rows > 8192:
        return sum_of_squares(x)
    strips = tf.reduce_sum(tf.reshape(tf.square(x), [8, strip]), axis=0)
    ones = tf.ones([strip // rows], x.dtype)
    return tf.reduce_sum(tf.linalg.matvec(tf.reshape(strips, [rows, -1]), ones))


def update_stored(
    plan: Plan,
    stored: Sequence[Any],
    gradient: tf.Tensor,
    step: tf.Tensor,
    learning_rate: tf.Tensor,
    seed: tf.Tensor,
    *,
    compiled: bool,
) -> tuple[list[tf.Tensor], tf.Tensor | None]:
    """Returns what is stored of a variable after one step, and its statistics.

    Args:
      plan: how to update.
      stored: the parameter, its slots and, if `plan.residual`, what rounding cut off.
      gradient: dense, as the parameter in shape.
      step: scalar, counts from 1.
      learning_rate: scalar.
      seed: int32 scalar, the variable's own.
      compiled: whether XLA compiles this.

    Returns:
      The new tensors of `stored` in their dtypes; if `plan.record`, float32 [3]: param_norm,
      update_norm and trust_ratio.
    """
    settings = plan.settings
    param, *slots = [tf.convert_to_tensor(value) for value in stored]
    residual = slots.pop() if plan.residual else None
    dtype = compute_dtype(param.dtype)
    state = [widen(param, residual), *(tf.cast(slot, dtype) for slot in slots)]
    seeds: list[Any] = [None] * len(state)
    if any(is_low(value.dtype) for value in (param, *slots)):
        seeds = [tf.stack([tf.cast(step, tf.int32), seed * 4 + i]) for i in range(len(state))]
    kept: dict[int, tf.Tensor] = {}

    def keep(moment: tf.Tensor, number: int) -> tf.Tensor:
        # The second moment moves by 0.1% a step, less than bfloat16 resolves: always stochastic.
        low, seed = slots[number].dtype, seeds[1 + number]
        kept[number] = narrow(moment, low, "stochastic", seed)[0]
        # The update takes what is stored: it is computed in a second pass, after the norms, which
        # then reads the moments in their few bits and not what they were made of.
        return tf.cast(kept[number], dtype)

    (x, *_), statistics = plan.rule(
        state,
        tf.cast(gradient, dtype),
        step,
        tf.cast(learning_rate, dtype),
        settings,
        decayed=plan.decayed,
        adapted=plan.adapted,
        squares=sum_of_squares_on_cpu if plan.on_cpu and compiled else sum_of_squares,
        keep=keep,
    )
    new, new_residual = narrow(x, param.dtype, settings.rounding, seeds[0])
    residuals = [new_residual] if plan.residual else []
    figures = tf.cast(tf.stack(statistics), tf.float32) if plan.record else None
    return [new, *(kept[i] for i in range(len(slots))), *residuals], figures


@functools.lru_cache(maxsize=4096)
def compiled_update(plan: Plan, signature: Hashable) -> Callable:
    """Returns `update_stored` compiled by XLA; it is traced once, for the signature's shapes."""
    del signature
    return tf.function(
        functools.partial(update_stored, plan, compiled=True), jit_compile=True, autograph=False
    )


def compiled_program(plan: Plan) -> Callable:
    """Returns a function, compiled by XLA, that updates several variables in place.

    TensorFlow ties it to the variables of its first call: it must not outlive them.

    Args of the function: for each variable a list of its stored `tf.Variable`s, the gradients,
    step, learning rate, int32 seeds, and for each variable the `tf.Variable` that takes its
    statistics, or an empty list.
    """

    def program(variables, gradients, step, learning_rate, seeds, statistics):
        for i, (stored, gradient) in enumerate(zip(variables, gradients, strict=True)):
            new, figures = update_stored(
                plan, stored, gradient, step, learning_rate, seeds[i], compiled=True
            )
            for variable, value in zip(stored, new, strict=True):
                variable.assign(value)
            if plan.record:
                statistics[i].assign(figures)

    return tf.function(program, jit_compile=True, autograph=False)


def compiles_itself(jit_compile: bool | None) -> bool:
    """Tells whether updates are compiled by themselves in the current strategy.

    Args:
      jit_compile: as the user says; `None` means yes, except on TPUs, where the whole step is
        compiled, under a parameter server, and on Apple's processors, where TensorFlow has no XLA.
    """
    if jit_compile is not None:
        return jit_compile
    elsewhere = (
        tf.distribute.TPUStrategy,
        tf.distribute.experimental.TPUStrategy,  # its older name is another class
        tf.distribute.ParameterServerStrategy,
    )
    apple = platform.system() == "Darwin" and "arm" in platform.processor().lower()
    return not apple and not isinstance(tf.distribute.get_strategy(), elsewhere)


def signature_of(stored: Sequence[Any]) -> Hashable:
    """Returns shape and dtypes, which decide whether two variables share a program."""
    return tuple(stored[0].shape), tuple(value.dtype for value in stored)


def programs(keys: Sequence[Hashable], sizes: Sequence[int]) -> list[list[int]]:
    """Groups positions with equal keys, large ones by up to `PROGRAM_VARIABLES`, others alone.

    The largest come first: on several cores the small ones then fill the gaps.
    """
    groups: list[list[int]] = []
    last: dict[Hashable, list[int]] = {}
    for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        group = last.get(key)
        if group is None or size < LARGE or len(group) == PROGRAM_VARIABLES:
            group = last[key] = []
            groups.append(group)
        group.append(i)
    return sorted(groups, key=lambda group: -sizes[group[0]])
