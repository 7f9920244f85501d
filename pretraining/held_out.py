"""The held-out records of each phase, and their evaluation while a run goes on or afterwards."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from pretraining import console, input_pipeline
from pretraining.bad_numbers import diverged
from pretraining.config import Config
from pretraining.data import Data
from pretraining.evaluation import Evaluator
from pretraining.phases import phase_that_led_to
from pretraining.run_plan import PhasePlan

QUICK_SECONDS = 3.0  # an evaluation that is over by then shows no progress


class HeldOut:
    """Evaluates a model on the held-out records of the phase that led to a step.

    Args:
      config: the flags.
      strategy: where it runs.
      network: the model, from `model.build_pretrainer`.
      data: the records of each phase.
      plans: the batches of each phase.
      jit_compile: whether XLA compiles the forward pass by itself.
    """

    def __init__(
        self,
        config: Config,
        strategy: tf.distribute.Strategy,
        network: tf_keras.Model,
        data: Sequence[Data],
        plans: Sequence[PhasePlan],
        *,
        jit_compile: bool,
    ):
        self._config = config
        self._strategy = strategy
        self._network = network
        self._data = data
        self._plans = plans
        self._jit_compile = jit_compile
        self._evaluators: dict[int, Evaluator] = {}

    @property
    def is_there(self) -> bool:
        """Whether the run has held-out records at all."""
        return self._data[0].held_out is not None

    def evaluated(self, step: int) -> dict[str, Any]:
        """Returns what an evaluation after `step` updates is of; other files make it anew."""
        held_out = self._data[self.phase(step) - 1].held_out
        return {
            "eval_files": held_out.fingerprint if held_out else None,
            "eval_steps": self._config.eval_steps,
        }

    def evaluate(self, step: int) -> dict[str, float]:
        """Returns losses and accuracies over all held-out records, each once, and says them.

        Args:
          step: updates made so far.

        Raises:
          InputError: a record is damaged, or the loss is not finite.
        """
        number = self.phase(step)
        data, plan = self._data[number - 1], self._plans[number - 1].held_out
        batches = math.ceil(data.held_out.num_records / plan.global_batch_size)
        if self._config.eval_steps:
            batches = min(batches, self._config.eval_steps)
        if number not in self._evaluators:
            self._evaluators = {
                number: Evaluator(
                    self._strategy,
                    self._network,
                    data.eval_input(plan),
                    jit_compile=self._jit_compile,
                )
            }
        try:
            with console.progress("Evaluating", batches, " batches", delay=QUICK_SECONDS) as bar:
                result = self._evaluators[number].evaluate(batches, bar.update)
        except input_pipeline.FAILURES as error:
            raise data.eval_fault(error) from None
        if not math.isfinite(result["loss"]):
            raise diverged("the held-out loss", step)
        phase = f" of {self._config.phases[number - 1].max_seq_length} tokens"
        console.say(
            f"Held out{phase if len(self._plans) > 1 else ''} after {step} updates: masked-LM loss "
            f"{result['mlm_loss']:.3f}, accuracy {result['mlm_accuracy']:.2%}; next-sentence accuracy "
            f"{result['nsp_accuracy']:.2%}"
        )
        return result

    def phase(self, step: int) -> int:
        """Returns the number of the phase that an evaluation after `step` updates is of."""
        return phase_that_led_to(self._config.phases, step).number
