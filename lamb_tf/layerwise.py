"""What the optimizers of both Kerases share: who is treated how, and the update applied."""

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import tensorflow as tf

from lamb_tf.exclusions import Treatment, table, treat, variable_name
from lamb_tf.layer_update import (
    Plan,
    compiled_program,
    compiled_update,
    compiles_itself,
    programs,
    signature_of,
    update_stored,
)
from lamb_tf.precision import compute_dtype, is_low
from lamb_tf.settings import LayerwiseSettings
from lamb_tf.update_rule import LayerStatistics


class LayerwiseMethods:
    """Mixed into a Keras optimizer, before its base class.

    Attributes:
      iterations: of the base class, updates made so far.
    """

    iterations: Any
    _rule: ClassVar[Callable]
    _slot_names: ClassVar[tuple[str, ...]]
    _settings: LayerwiseSettings
    _jit: bool | None
    _record: bool
    # Out of the reach of Keras' tracking, so that it is no part of a checkpoint.
    _layers: types.SimpleNamespace

    def describe(self, variables: Sequence[Any]) -> str:
        """Returns a table that says of each variable whether it is decayed and adapted.

        Args:
          variables: for instance `model.trainable_variables`.
        """
        return table([self._treat(variable) for variable in variables])

    def layer_statistics(self) -> dict[str, LayerStatistics]:
        """Returns norms and trust ratio of each variable in the newest step, as floats.

        They were computed in the update itself; this only reads them. All zero before the first
        step.

        Raises:
          ValueError: the optimizer was made without `layer_statistics=True`.
        """
        if not self._record:
            raise ValueError("layer statistics need layer_statistics=True. Received: False")
        layers = getattr(self, "_layers", types.SimpleNamespace(names=[], statistics=[]))
        return {
            name: LayerStatistics(*map(float, variable.numpy()))
            for name, variable in zip(layers.names, layers.statistics, strict=True)
        }

    def _treat(self, variable: Any) -> Treatment:
        settings = self._settings
        treatment = treat(
            variable, settings.exclude_from_weight_decay, settings.exclude_from_layer_adaptation
        )
        # The base class' method `exclude_from_weight_decay` counts as well.
        decayed = treatment.decayed and self._use_weight_decay(variable)  # type: ignore[attr-defined]
        return dataclasses.replace(treatment, decayed=decayed)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Does nothing: the base class would decay a second time, outside the trust ratio."""

    def _slot_dtypes(self, dtype: tf.DType, name: str) -> dict[str, tf.DType]:
        """Returns names and dtypes of what is kept beside a variable of that dtype."""
        settings = self._settings
        if settings.rounding == "stochastic" and is_low(dtype) and dtype != tf.bfloat16:
            raise ValueError(
                f"rounding='stochastic' needs bfloat16 variables. Received: {name} of {dtype.name}"
            )
        moment = tf.as_dtype(settings.moment_dtype or compute_dtype(dtype))
        slots = dict.fromkeys(self._slot_names, moment)
        if settings.rounding == "compensated" and is_low(dtype):
            slots["residual"] = tf.bfloat16
        return slots

    def _build_layers(self, variables: Sequence[Any], add_slot: Callable) -> None:
        """Resolves exclusions by name, which updates no longer know, and adds the slots.

        Args:
          variables: those that will be trained.
          add_slot: from a variable, a slot's name and dtype to the variable that holds the slot.
        """
        settings = self._settings
        settings.warn_of_unused(variables)
        slots: dict[str, list] = {name: [] for name in (*self._slot_names, "residual")}
        plans = []
        for variable in variables:
            treatment = self._treat(variable)
            dtypes = self._slot_dtypes(
                tf.as_dtype(getattr(variable, "true_dtype", variable.dtype)), treatment.name
            )
            for name, kept in slots.items():
                kept.append(add_slot(variable, name, dtypes[name]) if name in dtypes else None)
            plans.append(
                Plan(
                    rule=type(self)._rule,
                    settings=settings.without_exclusions(),
                    decayed=treatment.decayed,
                    adapted=treatment.adapted,
                    residual="residual" in dtypes,
                    record=self._record,
                    on_cpu="CPU" in (tensor_variable(variable).device or "").upper(),
                )
            )
        for name, kept in slots.items():
            if any(slot is not None for slot in kept):
                setattr(self, f"_{name}s", kept)
        self._layers = types.SimpleNamespace(
            plans=plans,
            names=_unique([variable_name(variable) for variable in variables]),
            variables=list(variables),  # as programs hold on to them
            programs={},
            statistics=[self._add_statistics(v) for v in variables] if self._record else [],
        )

    def _add_statistics(self, variable: Any) -> tf.Variable:
        with tf.distribute.get_strategy().extended.colocate_vars_with(tensor_variable(variable)):
            return tf.Variable(tf.zeros([3]), trainable=False, name="layer_statistics")

    def _stored(self, index: int, variable: Any) -> list[Any]:
        """Returns the variable and what is kept beside it."""
        names = [*self._slot_names, *(["residual"] if self._layers.plans[index].residual else [])]
        return [
            tensor_variable(variable),
            *(tensor_variable(getattr(self, f"_{n}s")[index]) for n in names),
        ]

    def _next_step(self) -> tf.Tensor:
        """Returns t of the coming update, an int32 scalar that counts from 1."""
        return tf.cast(tf.convert_to_tensor(self.iterations), tf.int32) + 1

    def _update(self, index: int, variable: Any, gradient: Any, learning_rate: Any) -> None:
        """Updates one variable, in the update context of any strategy."""
        stored = self._stored(index, variable)
        plan = self._layers.plans[index]
        args = (
            [tf.convert_to_tensor(value) for value in stored],
            tf.convert_to_tensor(gradient),  # adds up the rows of repeated ids
            self._next_step(),
            tf.convert_to_tensor(learning_rate),
            tf.constant(index),
        )
        if compiles_itself(self._jit):
            new, figures = compiled_update(plan, signature_of(stored))(*args)
        else:
            new, figures = update_stored(plan, *args, compiled=False)
        for kept, value in zip(stored, new, strict=True):
            kept.assign(value)
        if self._record:
            self._layers.statistics[index].assign(figures)

    def _update_all(
        self, indices: Sequence[int], variables: Sequence[Any], gradients: Sequence[Any], rate: Any
    ) -> None:
        """Updates variables outside any strategy, several in one program."""
        layers = self._layers
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        stored = [self._stored(i, v) for i, v in zip(indices, variables, strict=True)]
        keys = [
            (layers.plans[i], signature_of(s), g.dtype)
            for i, s, g in zip(indices, stored, gradients, strict=True)
        ]
        step = self._next_step()
        rate = tf.convert_to_tensor(rate)
        for group in programs(keys, [v.shape.num_elements() for v, *_ in stored]):
            places = [indices[j] for j in group]
            key = (*keys[group[0]], len(group))
            if key not in layers.programs:
                layers.programs[key] = compiled_program(key[0])
            layers.programs[key](
                [stored[j] for j in group],
                [gradients[j] for j in group],
                step,
                rate,
                tf.constant(places),
                [layers.statistics[i] for i in places] if self._record else [],
            )

    def _in_place(self, variables: Sequence[Any]) -> bool:
        """Tells whether `_update_all` may be used: it compiles, no strategy, plain variables."""
        return (
            not tf.distribute.has_strategy()
            and compiles_itself(self._jit)
            and all(hasattr(tensor_variable(v), "handle") for v in variables)
        )


def _unique(names: Sequence[str]) -> list[str]:
    """Appends _1, _2 and so on to repeated names."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen[name] = seen.get(name, -1) + 1
        result.append(f"{name}_{count}" if count else name)
    return result


def tensor_variable(variable: Any) -> tf.Variable:
    """Returns the `tf.Variable` in a `keras.Variable` or an `AutoCastVariable`."""
    for attribute in ("_value", "_variable"):
        inner = getattr(variable, attribute, None)
        if isinstance(inner, tf.Variable):
            return inner
    return variable
