"""What happens on the host after each loop on the device."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import tqdm

from lamb_tf.keras2 import WarmupPolynomialDecay
from pretraining import console, model_flops
from pretraining.bad_numbers import check_loss, check_skipped
from pretraining.config import Config
from pretraining.interruption import Interrupted
from pretraining.model import BertConfig
from pretraining.phases import Phase
from pretraining.run_logs import NoLogs, RunLogs
from pretraining.train_step import PretrainingStep, means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the actions look at and write to, the same for all phases of a start.

    Attributes:
      config: the flags.
      bert: the model's dimensions.
      vocab_size: width of the masked-LM logits.
      layers: names of the trainable variables.
      schedule: the learning rate by step.
      peak_flops: of all replicas together, a second.
      logs: where the figures go.
      bar: the progress of the run.
      stop_requests: grows when the run is asked to stop.
      agree: makes all workers of one mind on a stop request.
      check_lock: raises where another run has taken the folder.
    """

    config: Config
    bert: BertConfig
    vocab_size: int
    layers: Sequence[str]
    schedule: WarmupPolynomialDecay
    peak_flops: float
    logs: RunLogs | NoLogs
    bar: tqdm.tqdm
    stop_requests: Sequence[str]
    agree: Callable[[bool], bool]
    check_lock: Callable[[], None]


class LoopActions:
    """Called by Orbit after each loop of a phase: metrics, progress, and a look at requests."""

    def __init__(
        self,
        outlook: Outlook,
        phase: Phase,
        global_batch_size: int,
        step: PretrainingStep,
        corrupt_records: int | None = None,
    ):
        self._outlook = outlook
        self._phase = phase
        self._global_batch_size = global_batch_size
        self._step = step
        self._corrupt_records = corrupt_records
        self._loops = 0
        self.loop_seconds = 0.0  # of the last loop; 0 for the first, which compiles
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last loop, an evaluation say, out of the rates."""
        self._then = time.monotonic()

    def obey_requests(self) -> None:
        """Raises `Interrupted` if any worker was asked to stop."""
        requests = self._outlook.stop_requests
        if self._outlook.agree(bool(requests)):
            raise Interrupted(requests[0] if requests else "a request to another worker")

    def __call__(self, output: dict[str, Any]) -> None:
        """Takes the output of `Trainer.train`.

        Raises:
          InputError: gradients are not finite or the loss explodes; another run is at work here.
          Interrupted: the run is asked to stop.
        """
        outlook = self._outlook
        step = int(self._step.optimizer.iterations.numpy())
        before, seconds = int(outlook.bar.n), time.monotonic() - self._then
        self.loop_seconds = seconds if self._loops else 0.0
        self._loops += 1
        skipped = self._step.skipped
        check_skipped(
            int(output["longest_skip"]),
            outlook.config.max_skipped_steps,
            skipped,
            outlook.layers,
            step,
        )
        values = self._metrics(output, step, step - before, seconds)
        check_loss(values["loss"], outlook.vocab_size, outlook.layers[int(output["largest"])], step)
        outlook.check_lock()
        outlook.logs.training(step, values)
        every = outlook.config.log_layers_every_steps
        if every and step // every > before // every and self._keeps_statistics:
            outlook.logs.layers(step, self._step.optimizer.layer_statistics())
        outlook.bar.set_postfix_str(
            f" loss {values['loss']:.3f}, masked-LM accuracy {values['mlm_accuracy']:.1%}",
            refresh=False,
        )
        if self._loops == 1:  # it has compiled
            console.leave_out(outlook.bar, step - before)
        else:
            outlook.bar.update(step - before)
        self.restart_clock()
        if step < outlook.config.total_steps:  # else there is nothing left to stop
            self.obey_requests()

    @property
    def _keeps_statistics(self) -> bool:
        return hasattr(self._step.optimizer, "layer_statistics")

    def _metrics(
        self, output: dict[str, Any], step: int, steps: int, seconds: float
    ) -> dict[str, Any]:
        outlook = self._outlook
        sums = {name: float(value) for name, value in output.items()}
        work = model_flops.flops(
            outlook.bert,
            outlook.vocab_size,
            tokens=sums["tokens"],
            token_pairs=sums["token_pairs"],
            predictions=sums["mlm_count"],
            rows=sums["nsp_count"],
        )
        values = {
            **means(sums),
            # The rate of the update that was made last.
            "learning_rate": float(outlook.schedule(step - 1)),
            "grad_norm": sums["grad_norm"] if math.isfinite(sums["grad_norm"]) else None,
            "examples_per_sec": steps * self._global_batch_size / seconds,
            "tokens_per_sec": sums["tokens"] / seconds,
            "model_flops_utilization": work / seconds / outlook.peak_flops,
            "skipped_steps": int(self._step.skipped.total.numpy()),
            "phase": self._phase.number,
        }
        if self._corrupt_records is not None:
            values["corrupt_records"] = self._corrupt_records
        return values
