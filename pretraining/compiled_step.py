"""The run's own training step, compiled for a slice that is not there."""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from concurrent import futures

import tensorflow as tf
import tf_keras

from pretraining import model, model_flops
from pretraining.config import Config
from pretraining.optimization import build_optimizer
from pretraining.phases import Phase
from pretraining.train_step import UPDATE_SCOPE, PretrainingStep, SkippedSteps
from tpu.chips import Slice
from tpu.compiler import CompileError, cross_replica_sum, replica_number
from tpu.device_memory import host_memory
from tpu.preflight import StepReport, preflight

# Measured with BERT-Large: the variables with TensorFlow, and libtpu's compiler.
HELD_BYTES, COMPILER_BYTES = 7 * 2**30, 7 * 2**30


class StepCompiler:
    """Compiles the step of a run at any batch.

    Args:
      config: the flags.
      bert: the dimensions.
      vocab_size: width of the masked-LM logits.
      where: the slice.
    """

    def __init__(self, config: Config, bert: model.BertConfig, vocab_size: int, where: Slice):
        tf_keras.mixed_precision.set_global_policy(
            "mixed_bfloat16" if config.precision == "bfloat16" else "float32"
        )
        self._config = config
        self._bert = dataclasses.replace(bert, vocab_size=vocab_size)
        self._where = where
        self._model = model.build_pretrainer(self._bert, vocab_size, initialized=False)
        # On a TPU the whole step is one program.
        self._optimizer = build_optimizer(config, compiles_itself=False)
        self._optimizer.build(self._model.trainable_variables)
        self._skipped = SkippedSteps()
        self._reports: dict[tuple[int, int, int], futures.Future[StepReport]] = {}
        self._seconds: dict[tuple[int, int, int], float] = {}
        at_once = max(1, (host_memory() - HELD_BYTES) // COMPILER_BYTES)
        self._threads = futures.ThreadPoolExecutor(min(at_once, os.cpu_count() or 1))

    def begin(self, phase: Phase, rows: int, accumulation_steps: int) -> None:
        """Begins to compile the step of a phase, once for each batch; other threads go on with it.

        Args:
          phase: its lengths.
          rows: of a micro-batch on one device.
          accumulation_steps: micro-batches.
        """
        key = (phase.number, rows, accumulation_steps)
        if key in self._reports:
            return
        started = time.monotonic()

        def timed(compiled: Callable[[], StepReport]) -> StepReport:
            try:
                return compiled()
            finally:
                self._seconds[key] = time.monotonic() - started

        try:
            with warnings.catch_warnings():  # of large gradients; this device will compute nothing
                warnings.simplefilter("ignore", UserWarning)
                compiled = self._lowered(phase, rows, accumulation_steps)
            self._reports[key] = self._threads.submit(timed, compiled)
        except CompileError as error:
            self._reports[key] = futures.Future()
            self._reports[key].set_exception(error)

    def compile(self, phase: Phase, rows: int, accumulation_steps: int) -> StepReport:
        """Compiles the step of a phase, if that has not begun, and waits for the result.

        Args:
          phase: as for `begin`.
          rows: likewise.
          accumulation_steps: likewise.

        Raises:
          CompileError: it cannot run there.
        """
        self.begin(phase, rows, accumulation_steps)
        return self._reports[phase.number, rows, accumulation_steps].result()

    def seconds(self, phase: Phase, rows: int, accumulation_steps: int) -> float:
        """Returns how long that took from its beginning, beside whatever ran at the same time."""
        return self._seconds.get((phase.number, rows, accumulation_steps), 0.0)

    def _lowered(
        self, phase: Phase, rows: int, accumulation_steps: int
    ) -> Callable[[], StepReport]:
        total = rows * accumulation_steps
        step = PretrainingStep(
            self._model,
            self._optimizer,
            skipped=self._skipped,
            seed=self._config.seed,
            accumulation_steps=accumulation_steps,
            clip_global_norm=self._config.clip_global_norm,
            jit_compile=False,
        )
        batch = batch_shapes(phase, total)
        reduce = cross_replica_sum(self._where)

        def device_step(*flat: tf.Tensor) -> dict[str, tf.Tensor]:
            strategy = tf.distribute.get_strategy()
            with tf.distribute.ReplicaContext(strategy, replica_number()):
                return step(tf.nest.pack_sequence_as(batch, flat), reduce)

        tokens = total * phase.max_seq_length
        return preflight(
            device_step,
            tf.nest.flatten(batch),
            self._where,
            variables=self._assigned,
            model_flops=model_flops.flops(
                self._bert,
                self._bert.vocab_size,
                tokens=tokens,
                token_pairs=tokens * phase.max_seq_length,
                predictions=total * phase.max_predictions_per_seq,
                rows=total,
            ),
            update_scope=rf"\b{UPDATE_SCOPE}/",
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of the variables that an update assigns."""
        return sum(v.shape.num_elements() * v.dtype.size for v in self._assigned)

    @property
    def _assigned(self) -> list[tf.Variable]:
        """The variables that an update assigns."""
        return [
            *self._model.trainable_variables,
            *self._optimizer.variables,
            *self._skipped.variables,
        ]


def batch_shapes(phase: Phase, rows: int) -> dict[str, tf.TensorSpec]:
    """Returns shapes and dtypes of a batch as `train_step.forward_sums` takes it."""
    ids = tf.TensorSpec([rows, phase.max_seq_length], tf.int32)
    places = tf.TensorSpec([rows, phase.max_predictions_per_seq], tf.int32)
    return {
        "input_word_ids": ids,
        "input_mask": ids,
        "input_type_ids": ids,
        "masked_lm_positions": places,
        "masked_lm_ids": places,
        "masked_lm_weights": tf.TensorSpec(places.shape, tf.float32),
        "next_sentence_labels": tf.TensorSpec([rows], tf.int32),
        "row_weights": tf.TensorSpec([rows], tf.float32),
    }
