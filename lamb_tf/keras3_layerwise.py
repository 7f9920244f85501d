"""The part of a Keras 3 optimizer that LAMB and LARS have in common."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from lamb_tf.exclusions import variable_name
from lamb_tf.layerwise import LayerwiseMethods, tensor_variable
from lamb_tf.settings import LayerwiseSettings, check_learning_rate, shortest


class Layerwise(LayerwiseMethods, keras.optimizers.Optimizer):
    """Base of the Keras 3 optimizers; see `keras3`.

    Keras 3 clips gradients before it adds up those of the replicas, and leaves repeated ids of
    sparse gradients apart while it clips. Here gradients are made dense and added up first.
    """

    def __init__(
        self,
        settings: LayerwiseSettings,
        learning_rate: Any,
        *,
        layer_statistics: bool,
        jit_compile: bool | None,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate=check_learning_rate(learning_rate),
            weight_decay=settings.weight_decay,
            **kwargs,
        )
        self._settings = settings
        self._jit = jit_compile
        self._record = layer_statistics

    def build(self, variables: Sequence) -> None:
        """Creates what is kept beside every variable.

        Args:
          variables: the variables that will be trained, `keras.Variable` or `tf.Variable`.
        """
        _mend_loss_scale(sys._getframe(1).f_locals.get("self"), self)
        if self.built:
            return
        super().build(variables)
        self._build_layers(variables, self._add_slot)

    def _add_slot(self, variable: Any, name: str, dtype: tf.DType) -> keras.Variable:
        strategy = self._distribution_strategy
        with strategy.extended.colocate_vars_with(tensor_variable(variable)):
            return self.add_variable(
                shape=variable.shape,
                dtype=dtype.name,
                name=f"{variable_name(variable).replace('/', '_')}_{name}",
            )

    def update_step(self, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
        """Updates one variable and what is kept beside it.

        Args:
          gradient: a tensor or `tf.IndexedSlices`, as `variable` in shape.
          variable: one of the variables that the optimizer was built with.
          learning_rate: a scalar.
        """
        self._update(self._get_variable_index(variable), variable, gradient, learning_rate)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Excludes variables from weight decay, before the optimizer is built.

        Raises:
          ValueError: it is built; Keras 3 by itself would say nothing.
        """
        if self.built:
            raise ValueError(
                "exclude_from_weight_decay must be called before the optimizer is built. "
                f"Received: var_list={var_list}, var_names={var_names}"
            )
        super().exclude_from_weight_decay(var_list, var_names)

    def _backend_apply_gradients(self, grads: Sequence, trainable_variables: Sequence) -> None:
        context = tf.distribute.get_replica_context()
        grads = [tf.convert_to_tensor(gradient) for gradient in grads]
        if context is not None and context.num_replicas_in_sync > 1:
            if self.gradient_accumulation_steps:
                raise ValueError(
                    "gradient_accumulation_steps works on one replica only in Keras 3. Received: "
                    f"{self.gradient_accumulation_steps} steps on "
                    f"{context.num_replicas_in_sync} replicas"
                )
            grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        super()._backend_apply_gradients(grads, trainable_variables)

    def _all_reduce_sum_gradients(self, grads_and_vars: Sequence) -> Sequence:
        """Returns the gradients as they are: they were added up before they were clipped."""
        return grads_and_vars

    def _backend_update_step(
        self, grads: Sequence, trainable_variables: Sequence, learning_rate: Any
    ) -> None:
        if not self._in_place(trainable_variables):
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        indices = [self._get_variable_index(variable) for variable in trainable_variables]
        self._update_all(indices, trainable_variables, grads, learning_rate)

    def _get_current_learning_rate(self) -> Any:
        # Keras 3 counts calls here, not updates, while gradients accumulate.
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    def get_config(self) -> dict:
        """Returns every argument of the constructor, serialisable."""
        config = super().get_config()
        return {
            **config,
            "learning_rate": shortest(config["learning_rate"]),
            **self._settings.config(),
            "jit_compile": self._jit,
            "layer_statistics": self._record,
        }


def _mend_loss_scale(wrapper: Any, optimizer: Layerwise) -> None:
    """Makes a loss-scale optimizer that wraps ours look for overflow on all replicas.

    Keras 3 asks the first replica alone, before gradients are added up, and so would destroy the
    weights when another one overflows. It calls our `build` and nothing else that it passes
    itself to, hence the look at the caller.
    """
    if not isinstance(wrapper, keras.optimizers.LossScaleOptimizer):
        return
    if wrapper.inner_optimizer is optimizer:
        wrapper.check_finite = functools.partial(_finite_on_all_replicas, wrapper)


def _finite_on_all_replicas(wrapper: keras.optimizers.LossScaleOptimizer, grads: Sequence) -> Any:
    finite = type(wrapper).check_finite(wrapper, grads)
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return finite
    overflows = tf.cast(tf.logical_not(finite), tf.int32)
    return tf.equal(context.all_reduce(tf.distribute.ReduceOp.SUM, overflows), 0)
