"""One start of a run: the model, its optimizer, and the phases that train and evaluate them."""

import contextlib
import time
from collections.abc import Callable, Sequence

import orbit
import tensorflow as tf
import tf_keras

from pretraining import console, files, input_pipeline, model, model_flops, workers
from pretraining.bad_numbers import WeightCheck
from pretraining.checkpoints import Checkpoints
from pretraining.config import Config
from pretraining.data import Data
from pretraining.errors import InputError
from pretraining.held_out import HeldOut
from pretraining.interruption import Interrupted, stop_requests
from pretraining.loop_actions import LoopActions, Outlook
from pretraining.optimization import build_optimizer, build_schedule
from pretraining.phases import is_due, next_stop, phase_of
from pretraining.preemption import SaveTimer
from pretraining.profiling import Profile
from pretraining.run_directory import RunDirectory
from pretraining.run_logs import NoLogs, RunLogs
from pretraining.run_plan import PhasePlan
from pretraining.run_report import write_report
from pretraining.run_summary import publish, say_result
from pretraining.train_step import PretrainingStep, SkippedSteps, Trainer


class Session:
    """One start of a run.

    Args:
      config: the flags.
      directory: what the run writes.
      strategy: where it runs.
      bert: the dimensions of the model.
      data: the records of each phase.
      plans: the batches of each phase.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        strategy: tf.distribute.Strategy,
        bert: model.BertConfig,
        data: Sequence[Data],
        plans: Sequence[PhasePlan],
    ):
        self._config = config
        self._directory = directory
        self._strategy = strategy
        self._bert = bert
        self._data = data
        self._plans = plans
        # A TPUStrategy compiles its steps as a whole.
        self._jit_compile = config.jit_compile and not isinstance(
            strategy, tf.distribute.TPUStrategy
        )
        tf_keras.mixed_precision.set_global_policy(
            "mixed_bfloat16" if config.precision == "bfloat16" else "float32"
        )
        tf_keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self._model = model.build_pretrainer(bert, len(data[0].words))
            self._optimizer = build_optimizer(config)
            self._optimizer.build(self._model.trainable_variables)
            self._skipped = SkippedSteps()
        self._check_weights = WeightCheck(strategy, self._model.trainable_variables)
        self._checkpoints = Checkpoints(
            directory.join("checkpoints"),
            tf.train.Checkpoint(
                model=self._model, optimizer=self._optimizer, skipped=self._skipped
            ),
            keep=config.keep_checkpoints,
            keep_every_steps=config.keep_every_steps,
        )
        self._held_out = HeldOut(
            config, strategy, self._model, data, plans, jit_compile=self._jit_compile
        )
        self._chief = workers.is_chief(strategy)
        self._timer = SaveTimer(config.steps_per_loop)
        self._profile = Profile(
            config.profiled if self._chief else None, directory.join("tensorboard/profile")
        )

    @property
    def step(self) -> int:
        """Updates made so far, skipped ones among them."""
        return int(self._optimizer.iterations.numpy())

    def train(self, check_lock: Callable[[], None]) -> bool:
        """Trains to the end, evaluating and saving on the way; goes on where it stopped.

        Args:
          check_lock: raises where another run has taken the folder; called after each loop.

        Returns:
          Whether the run is done; if not, it was asked to stop and has saved.

        Raises:
          InputError: the input is damaged, the disk is full, or the numbers went bad.
        """
        config = self._config
        layers = [v.name.removesuffix(":0") for v in self._model.trainable_variables]
        evaluated = self._held_out.evaluated(self.step)
        logs = RunLogs(self._directory, self.step, layers, evaluated) if self._chief else NoLogs()
        with (
            contextlib.closing(logs),
            console.progress("Training", config.total_steps, " steps", self.step) as bar,
            stop_requests() as requests,
        ):
            outlook = Outlook(
                config=config,
                bert=self._bert,
                vocab_size=self._bert.vocab_size or len(self._data[0].words),
                layers=layers,
                schedule=build_schedule(config),
                peak_flops=model_flops.matmul_rate(self._strategy, config.precision),
                logs=logs,
                bar=bar,
                stop_requests=requests,
                agree=lambda asked: workers.any_worker(self._strategy, asked),
                check_lock=check_lock,
            )
            try:
                self._evaluate_if_cut_off(logs)
                while self.step < config.total_steps:
                    self._train_phase(outlook)
            except Interrupted as request:
                self._save(logs)
                self._profile.end()
                bar.close()
                console.say(
                    f"{request}: stopped after {self.step} of {config.total_steps} updates and saved. "
                    "Repeat the command to go on."
                )
                return False
            last, result = logs.last, logs.last_evaluation
        if self._chief:
            publish(
                self._directory,
                step=self.step,
                checkpoint=self._checkpoints.newest,
                last=last,
                result=result,
                evaluated=self._held_out.evaluated(self.step),
                data=self._data[-1],
            )
        return True

    def restore(self) -> bool:
        """Restores the newest checkpoint, or the first weights; tells whether nothing is left to do.

        Raises:
          InputError: there are checkpoints and none of them can be read.
        """
        done = self._directory.read_json("summary.json")
        with self._strategy.scope():
            newest = self._checkpoints.restore(read_only=not self._chief)
        workers.agree(self._strategy, self.step, "the step of the newest checkpoint")
        if newest is None:
            if done:
                raise InputError(
                    f"--output_dir={self._directory.path}: expected the checkpoints of the run that "
                    "summary.json is of. Received: none"
                )
            self._start_from_weights()
            return False
        finished = self.step == self._config.total_steps
        current = done and (
            not self._held_out.is_there
            or done.get("evaluated") == self._held_out.evaluated(self.step)
        )
        if not (current and finished):
            console.say(f"Going on from {newest}")
            if done and not finished and self._chief:
                self._directory.remove("summary.json")  # it is of a step yet to come
            return False
        console.say(f"This run is done: {self.step} updates.")
        if self._chief and not files.is_file(self._directory.join("report.html"), "--output_dir"):
            write_report(self._directory)  # the disk was full, say
        say_result(done, self._directory)
        return True

    def _start_from_weights(self) -> None:
        if path := self._config.init_checkpoint:
            weights = tf.train.Checkpoint(model=self._model)
            with self._strategy.scope():
                Checkpoints("", weights, keep=1).restore_from(path, "--init_checkpoint")
            console.say(f"Starting from the weights of {path}")

    def _train_phase(self, outlook: Outlook) -> None:
        """Trains the phase of the present step from there to its end."""
        config = self._config
        number = phase_of(config.phases, self.step).number
        plan, data = self._plans[number - 1], self._data[number - 1]
        phase = plan.phase
        if len(self._plans) > 1:
            console.say(f"{phase}, batch {plan.train}, up to update {phase.end_step}")
        step = PretrainingStep(
            self._model,
            self._optimizer,
            skipped=self._skipped,
            seed=config.seed,
            accumulation_steps=plan.train.accumulation_steps,
            clip_global_norm=config.clip_global_norm,
            jit_compile=self._jit_compile,
        )
        seed, first = phase.data_seed(config.seed), self.step - phase.first_step
        batches = self._strategy.distribute_datasets_from_function(
            data.train_input(plan.train, seed, first)
        )
        corrupt = data.train.corrupt_records if config.skip_corrupt_records else None
        actions = LoopActions(outlook, phase, plan.train.global_batch_size, step, corrupt)
        with console.quiet():
            controller = orbit.Controller(
                global_step=self._optimizer.iterations,
                strategy=self._strategy,
                trainer=Trainer(self._strategy, step, iter(batches)),
                train_actions=[actions],
                steps_per_loop=config.steps_per_loop,
            )
        intervals = (config.save_every_steps, config.eval_every_steps)
        while self.step < phase.end_step:
            self._profile.look(self.step)
            try:
                with console.quiet():
                    controller.train(
                        next_stop(phase, self.step, intervals, config.profiled or ()),
                        checkpoint_at_completion=False,
                    )
            except input_pipeline.FAILURES as error:
                if lost := workers.lost_worker(self._strategy, error):
                    raise lost from None
                at = self.step - phase.first_step
                raise data.train_fault(error, plan.train, seed, at) from None
            self._profile.look(self.step)
            self._save_and_evaluate(outlook.logs, actions)

    def _save_and_evaluate(self, logs: RunLogs | NoLogs, actions: LoopActions) -> None:
        config, step = self._config, self.step
        # In a row of skipped updates the weights may be ruined: keep those from before it.
        sound = not int(self._skipped.in_row.numpy()) or step == config.total_steps
        if self._is_due(config.save_every_steps) and sound:
            seconds = self._save(logs)
            if warning := self._timer.warning(actions.loop_seconds, seconds):
                console.say(warning)
        if self._evaluation_is_due():
            self._evaluate(logs)
        if step < config.total_steps:
            actions.restart_clock()
            actions.obey_requests()

    def _is_due(self, interval: int) -> bool:
        return is_due(self._config.phases, self.step, interval)

    def _evaluation_is_due(self) -> bool:
        due = self._is_due(self._config.eval_every_steps)
        return self.step > 0 and due and self._held_out.is_there

    def _evaluate_if_cut_off(self, logs: RunLogs | NoLogs) -> None:
        """Makes up for an evaluation that a kill after the checkpoint has cut off."""
        missing = self._chief and logs.evaluated_step != self.step
        if workers.any_worker(self._strategy, bool(missing)) and self._evaluation_is_due():
            self._evaluate(logs)

    def _evaluate(self, logs: RunLogs | NoLogs) -> None:
        held_out, step = self._held_out, self.step
        result = {**held_out.evaluate(step), "phase": held_out.phase(step)}
        logs.evaluation(step, {**result, **held_out.evaluated(step)})

    def _save(self, logs: RunLogs | NoLogs) -> float:
        """Saves and returns how many seconds that took."""
        # The loss of a step is that before its update: look at what would be saved.
        self._check_weights(self.step)
        started = time.monotonic()
        if self._chief:
            logs.flush()  # so that no log ends before a checkpoint does
            self._checkpoints.save(self.step)
        return time.monotonic() - started

    def evaluate_checkpoint(self) -> None:
        """Evaluates `--eval_checkpoint`, or the newest one, and prints the result.

        Raises:
          InputError: there is no such checkpoint, or it is damaged or that of another model.
        """
        path = self._config.eval_checkpoint.removesuffix(".index")
        with self._strategy.scope():
            if path:
                self._checkpoints.restore_from(path, "--eval_checkpoint")
            else:
                path = self._checkpoints.restore(read_only=True)
        if not path:
            raise InputError(
                f"--output_dir={self._directory.path}: expected a checkpoint. Received: none there"
            )
        result = self._held_out.evaluate(self.step)
        console.say(f"Checkpoint: {path}")
        for name, value in result.items():
            console.say(f"  {name}: {value:.6f}")
