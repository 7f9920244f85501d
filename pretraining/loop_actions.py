"""What happens on the host after each loop on the device."""

import math
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tqdm

from lamb_tf.keras2 import WarmupPolynomialDecay
from pretraining.errors import InputError
from pretraining.interruption import Interrupted
from pretraining.run_directory import MetricsLog


def diverged(step: int) -> InputError:
    """The error of a run whose loss, gradient or weights are not finite any more."""
    return InputError(
        f"--learning_rate: expected a finite loss. Received: NaN or infinity at update {step}. "
        "Nothing was saved since the last checkpoint; a lower rate or a longer --warmup_steps may help"
    )


class LoopActions:
    """Called by Orbit after each loop: metrics, progress, and a look at signals."""

    def __init__(
        self,
        global_step: tf.Variable,
        learning_rate: WarmupPolynomialDecay,
        global_batch_size: int,
        metrics: MetricsLog,
        bar: tqdm.tqdm,
        stop_requested: Sequence[str],
        corrupt_records: int | None = None,
    ):
        self._global_step = global_step
        self._learning_rate = learning_rate
        self._global_batch_size = global_batch_size
        self._metrics = metrics
        self._bar = bar
        self._stop_requested = stop_requested
        self._corrupt_records = corrupt_records
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last loop, an evaluation say, out of the rates."""
        self._then = time.monotonic()

    def obey_signals(self) -> None:
        """Raises `Interrupted` if Ctrl-C or SIGTERM has arrived."""
        if self._stop_requested:
            raise Interrupted(self._stop_requested[0])

    def __call__(self, output: dict[str, Any]) -> None:
        """Takes the output of `Trainer.train`.

        Raises:
          InputError: the loss is not finite any more.
          Interrupted: a signal asks to stop.
        """
        step, now = int(self._global_step.numpy()), time.monotonic()
        values = {name: float(value) for name, value in output.items()}
        steps = step - self._bar.n
        # The rate of the update that was made last.
        values["learning_rate"] = float(self._learning_rate(step - 1))
        values["examples_per_sec"] = steps * self._global_batch_size / (now - self._then)
        if self._corrupt_records is not None:
            values["corrupt_records"] = self._corrupt_records
        output["learning_rate"] = values["learning_rate"]
        output["examples_per_sec"] = values["examples_per_sec"]
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise diverged(step)
        self._metrics.write(step, values)
        self._bar.set_postfix_str(
            f" loss {values['loss']:.3f}, masked-LM accuracy {values['mlm_accuracy']:.1%}",
            refresh=False,
        )
        self._bar.update(steps)
        self.restart_clock()
        self.obey_signals()
