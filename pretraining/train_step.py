"""One update of BERT pre-training, and the loop over updates that runs on the device.

The loss is the mean cross-entropy over the masked tokens of the whole global batch plus that
over its sentence pairs. Replicas therefore share one denominator, the global number of masked
tokens, and their gradients are summed: one replica and many give the same gradient.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orbit
import tensorflow as tf
import tf_keras

from pretraining import bert_forward

UPDATE_SCOPE = "optimizer_update"  # its operations bear this name in a profile
Batch = dict[str, tf.Tensor]
Sums = dict[str, tf.Tensor]
SUMS = (
    *("mlm_loss", "mlm_correct", "mlm_count", "nsp_loss", "nsp_correct", "nsp_count"),
    *("tokens", "token_pairs"),  # real ones: sums of n and of n * n over rows of n tokens
)


def forward_sums(model: tf_keras.Model, batch: Batch, key: tf.Tensor | None = None) -> Sums:
    """Runs the model and sums losses and hits over a batch.

    Args:
      model: from `model.build_pretrainer`.
      batch: int32 `input_word_ids`, `input_mask`, `input_type_ids` [rows, length]; int32
        `masked_lm_positions`, `masked_lm_ids` and float32 `masked_lm_weights` [rows, predictions];
        int32 `next_sentence_labels` [rows]; float32 `row_weights` [rows], 0 for padding rows.
      key: of the dropout, see `bert_forward.dropout_key`; `None` for none.

    Returns:
      Scalars of float32 under the names in `SUMS`.
    """
    masked_lm, next_sentence = bert_forward.forward(model, batch, key)
    weights = batch["masked_lm_weights"] * batch["row_weights"][:, None]
    sums = {
        **_sums_of("mlm", masked_lm, batch["masked_lm_ids"], weights),
        **_sums_of("nsp", next_sentence, batch["next_sentence_labels"], batch["row_weights"]),
    }
    lengths = tf.reduce_sum(tf.cast(batch["input_mask"], tf.float32), 1) * batch["row_weights"]
    return {**sums, "tokens": tf.reduce_sum(lengths), "token_pairs": tf.reduce_sum(lengths**2)}


def _sums_of(task: str, logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> Sums:
    labels, weights = tf.reshape(labels, [-1]), tf.reshape(weights, [-1])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    # Not argmax, which is slow on a CPU; a tie counts as a hit.
    hits = tf.gather(logits, labels, batch_dims=1) >= tf.reduce_max(logits, -1)
    return {
        f"{task}_loss": tf.reduce_sum(losses * weights),
        f"{task}_correct": tf.reduce_sum(tf.cast(hits, tf.float32) * weights),
        f"{task}_count": tf.reduce_sum(weights),
    }


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Turns sums over any number of batches into losses and accuracies; NaN where there are none."""

    def mean(name: str, count: str) -> float:
        return float(sums[name]) / float(sums[count]) if float(sums[count]) else math.nan

    mlm_loss, nsp_loss = mean("mlm_loss", "mlm_count"), mean("nsp_loss", "nsp_count")
    return {
        "loss": mlm_loss + nsp_loss,
        "mlm_loss": mlm_loss,
        "nsp_loss": nsp_loss,
        "mlm_accuracy": mean("mlm_correct", "mlm_count"),
        "nsp_accuracy": mean("nsp_correct", "nsp_count"),
    }


def on_first_replica(strategy: tf.distribute.Strategy, results: Any) -> Any:
    """Returns what the first replica of this process holds, of a nest in which all hold the same."""
    return tf.nest.map_structure(
        lambda value: strategy.experimental_local_results(value)[0], results
    )


def compiled_on_this_replica(function: Callable, jit_compile: bool) -> Callable:
    """Returns the function compiled by XLA; make it anew in each replica's call.

    One that replicas share would mix their variables.
    """
    # No conversion by autograph: there is no Python control flow over tensors in what we compile.
    return tf.function(function, jit_compile=True, autograph=False) if jit_compile else function


class SkippedSteps(tf.Module):
    """Updates that were left out because the gradient was not finite; part of a checkpoint.

    Make it in the strategy's scope.

    Attributes:
      total: how many, in the run.
      in_row: how many without one in between that was made, up to now.
      first: step of the first one of the row, counted from 1.
      layer: position among the trainable variables of the first that was not finite there.
    """

    def __init__(self):
        super().__init__()
        names = ("total", "in_row", "first", "layer")
        # int64 stays on the host's side of TensorFlow's placement rules, as `iterations` does.
        self.total, self.in_row, self.first, self.layer = (
            tf.Variable(0, dtype=tf.int64, trainable=False, name=f"skipped_{name}")
            for name in names
        )

    def note(self, step: tf.Tensor, layer: tf.Tensor) -> None:
        """Counts the update numbered `step`, from 1, as left out."""
        new_row = tf.equal(self.in_row.read_value(), 0)
        self.first.assign(tf.where(new_row, step, self.first.read_value()))
        self.layer.assign(tf.where(new_row, layer, self.layer.read_value()))
        self.total.assign_add(1)
        self.in_row.assign_add(1)

    def end_row(self) -> None:
        """Notes an update that was made."""
        self.in_row.assign(0)


class PretrainingStep:
    """Computes the gradients of one replica and applies the update of all of them.

    Attributes:
      model: from `model.build_pretrainer`, its variables created under the strategy.
      optimizer: a `tf_keras` optimizer, built; its `iterations` are the step of the run.
      skipped: the updates left out.
    """

    def __init__(
        self,
        model: tf_keras.Model,
        optimizer: tf_keras.optimizers.Optimizer,
        *,
        skipped: SkippedSteps,
        seed: int,
        accumulation_steps: int,
        clip_global_norm: float,
        jit_compile: bool,
    ):
        self.model = model
        self.optimizer = optimizer
        self.skipped = skipped
        self._seed = seed
        self._accumulation_steps = accumulation_steps
        self._clip_global_norm = clip_global_norm
        self._jit_compile = jit_compile

    def micro_gradients(
        self, batch: Batch, mlm_count: tf.Tensor, nsp_count: tf.Tensor, stream: tf.Tensor
    ) -> tuple[list[tf.Tensor], Sums]:
        """Returns the gradients and sums of a micro-batch.

        Args:
          batch: see `forward_sums`.
          mlm_count: float32 scalar, masked tokens of the global batch.
          nsp_count: float32 scalar, rows of it.
          stream: int64 scalar, which of the micro-batches of all replicas it is.
        """
        step = tf.identity(self.optimizer.iterations)
        key = bert_forward.dropout_key(self._seed, step, stream)
        with tf.GradientTape() as tape:
            sums = forward_sums(self.model, batch, key)
            loss = sums["mlm_loss"] / mlm_count + sums["nsp_loss"] / nsp_count
        gradients = tape.gradient(
            loss,
            self.model.trainable_variables,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return [tf.convert_to_tensor(gradient) for gradient in gradients], sums

    def _gradients(
        self, batch: Batch, mlm_count: tf.Tensor, nsp_count: tf.Tensor, replica: tf.Tensor
    ) -> tuple[list[tf.Tensor], Sums]:
        """Sums gradients over the micro-batches; no collective in here, so XLA may compile it."""
        count = self._accumulation_steps
        streams = tf.cast(replica, tf.int64) * count
        if count == 1:
            return self.micro_gradients(batch, mlm_count, nsp_count, streams)
        parts = {k: tf.reshape(v, [count, -1, *v.shape[1:]]) for k, v in batch.items()}
        zeros = (
            [tf.zeros(v.shape, v.dtype) for v in self.model.trainable_variables],
            {name: tf.zeros([]) for name in SUMS},
        )

        def add(micro: tf.Tensor, totals: tuple[list[tf.Tensor], Sums]):
            part = {name: value[micro] for name, value in parts.items()}
            stream = streams + tf.cast(micro, tf.int64)
            results = self.micro_gradients(part, mlm_count, nsp_count, stream)
            return micro + 1, tf.nest.map_structure(tf.add, totals, results)

        # A loop, so that the program is as large for many micro-batches as for one; one at a time,
        # as each takes the memory of its activations.
        _, totals = tf.while_loop(
            lambda micro, _: micro < count, add, (0, zeros), parallel_iterations=1
        )
        return totals

    def __call__(self, batch: Batch, cross_replica_sum: Callable) -> dict[str, tf.Tensor]:
        """Makes one update; call it in a replica context.

        A gradient that is not finite, on whichever replica, leaves weights and moments of all as
        they are; the step counts all the same, so that the next one sees the next batch.

        Args:
          batch: this replica's rows of the global batch, see `forward_sums`.
          cross_replica_sum: sums a nest of tensors over all replicas.

        Returns:
          The sums of `forward_sums` over all replicas, 0 where the update was skipped; the global
          `grad_norm` before clipping; `largest`, the position of the variable with the largest
          gradient.
        """
        row_weights = batch["row_weights"]
        counts = [
            tf.reduce_sum(batch["masked_lm_weights"] * row_weights[:, None]),
            tf.reduce_sum(row_weights),
        ]
        mlm_count, nsp_count = (tf.maximum(c, 1.0) for c in cross_replica_sum(counts))
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradients = compiled_on_this_replica(self._gradients, self._jit_compile)
        grads, sums = cross_replica_sum(gradients(batch, mlm_count, nsp_count, replica))
        squares = tf.stack([tf.reduce_sum(tf.square(grad)) for grad in grads])
        norm = tf.sqrt(tf.reduce_sum(squares))
        finite = tf.math.is_finite(norm)
        # The first of those that are not finite, or else the largest.
        largest = tf.argmax(tf.where(tf.math.is_finite(squares), squares, math.inf))
        if self._clip_global_norm:
            scale = self._clip_global_norm / tf.maximum(norm, self._clip_global_norm)
            grads = [grad * scale for grad in grads]
        tf.distribute.get_replica_context().merge_call(
            self._update_or_skip, args=(finite, largest, grads)
        )
        sums = {name: tf.where(finite, value, 0.0) for name, value in sums.items()}
        return {**sums, "grad_norm": norm, "largest": largest}

    def _update_or_skip(
        self, strategy: tf.distribute.Strategy, finite: Any, largest: Any, grads: Any
    ) -> None:
        """Decides for all replicas at once: in a replica's context no branch may hold an update."""
        iterations = self.optimizer.iterations
        layer = on_first_replica(strategy, largest)

        def update() -> tf.Tensor:
            strategy.extended.call_for_each_replica(self._apply, args=(grads,))
            self.skipped.end_row()
            return tf.constant(True)

        def skip() -> tf.Tensor:
            self.skipped.note(iterations.read_value() + 1, layer)
            iterations.assign_add(1)
            return tf.constant(False)

        tf.cond(on_first_replica(strategy, finite), update, skip)

    def _apply(self, grads: list[tf.Tensor]) -> None:
        with tf.name_scope(UPDATE_SCOPE):
            self.optimizer.apply_gradients(
                zip(grads, self.model.trainable_variables, strict=True),
                skip_gradients_aggregation=True,
            )


class Trainer(orbit.AbstractTrainer):
    """Orbit's inner loop: `num_steps` updates in one call to the device."""

    def __init__(
        self, strategy: tf.distribute.Strategy, step: PretrainingStep, batches: Iterator[Batch]
    ):
        self._strategy = strategy
        self._step = step
        self._batches = batches

    @tf.function
    def train(self, num_steps: tf.Tensor) -> dict[str, tf.Tensor]:
        """Makes `num_steps` updates, an int32 scalar.

        Returns:
          The sums in `SUMS` over them, `grad_norm` and `largest` of the last one, and
          `longest_skip`, int64: the most updates in a row that were skipped.
        """
        totals, grad_norm = {name: tf.zeros([]) for name in SUMS}, tf.zeros([])
        largest = longest = tf.zeros([], tf.int64)
        for _ in tf.range(num_steps):
            results = self._strategy.run(self._replica_step, args=(next(self._batches),))
            results = on_first_replica(self._strategy, results)
            totals = {name: totals[name] + results[name] for name in SUMS}
            grad_norm, largest = results["grad_norm"], results["largest"]
            longest = tf.maximum(longest, self._step.skipped.in_row.read_value())
        return {**totals, "grad_norm": grad_norm, "largest": largest, "longest_skip": longest}

    def _replica_step(self, batch: Batch) -> dict[str, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        all_reduce = functools.partial(context.all_reduce, tf.distribute.ReduceOp.SUM)
        return self._step(batch, all_reduce)
