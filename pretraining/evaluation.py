"""Evaluation over the held-out records, each exactly once."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from pretraining.records import RecordSet
from pretraining.train_step import (
    SUMS,
    Batch,
    Sums,
    compiled_on_this_replica,
    forward_sums,
    means,
    on_first_replica,
)

BATCHES_PER_LOOP = 20


class Evaluator:
    """Evaluation of every held-out row once, a loop of batches in one call to the device.

    The sums of each call are added up on the host in double precision: in float32 a sum of counts
    stands still at 2^24.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        model: tf_keras.Model,
        make_dataset: Callable[[tf.distribute.InputContext], tf.data.Dataset],
        *,
        jit_compile: bool,
    ):
        self._strategy = strategy
        self._model = model
        self._jit_compile = jit_compile
        self._dataset = strategy.distribute_datasets_from_function(make_dataset)

    def evaluate(
        self, num_batches: int, on_progress: Callable[[int], Any] = lambda batches: None
    ) -> dict[str, float]:
        """Returns losses and accuracies over so many batches from the first one on.

        Args:
          num_batches: how many.
          on_progress: told of every few batches.
        """
        batches = iter(self._dataset)
        totals = dict.fromkeys(SUMS, 0.0)
        left = num_batches
        while left:
            count = min(left, BATCHES_PER_LOOP)
            for name, value in self._loop(batches, tf.constant(count)).items():
                totals[name] += float(value)
            left -= count
            on_progress(count)
        return means(totals)

    @tf.function
    def _loop(self, batches: Iterator, num_steps: tf.Tensor) -> Sums:
        totals = {name: tf.zeros([]) for name in SUMS}
        for _ in tf.range(num_steps):
            results = self._strategy.run(self._replica_step, args=(next(batches),))
            results = on_first_replica(self._strategy, results)
            totals = {name: totals[name] + results[name] for name in SUMS}
        return totals

    def _replica_step(self, batch: Batch) -> Sums:
        context = tf.distribute.get_replica_context()
        forward = functools.partial(forward_sums, self._model)
        sums = compiled_on_this_replica(forward, self._jit_compile)(batch)
        return context.all_reduce(tf.distribute.ReduceOp.SUM, sums)


def most_frequent_label(train: RecordSet) -> int:
    """Returns the token that is most often to be predicted in the training records."""
    return int(np.argmax(train.label_counts))


def constant_accuracy(token: int, held_out: RecordSet) -> float:
    """Returns the masked-LM accuracy on held-out records of always guessing one token."""
    return float(held_out.label_counts[token] / max(1, held_out.label_counts.sum()))
