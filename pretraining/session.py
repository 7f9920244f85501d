"""One start of a run: the model, its optimizer, and the loop that trains and evaluates them."""

import contextlib
import math
from typing import Any

import orbit
import tensorflow as tf
import tf_keras

from pretraining import console, evaluation, input_pipeline, model
from pretraining.batch_plan import BatchPlan
from pretraining.config import Config
from pretraining.data import Data
from pretraining.errors import InputError
from pretraining.interruption import Interrupted, stop_signals
from pretraining.loop_actions import LoopActions, diverged
from pretraining.optimization import build_optimizer, build_schedule
from pretraining.run_directory import MetricsLog, RunDirectory, writing
from pretraining.train_step import PretrainingStep, Trainer


class Session:
    """One start of a run: its model and optimizer, and the loop that trains them."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        strategy: tf.distribute.Strategy,
        bert: model.BertConfig,
        data: Data,
        train_plan: BatchPlan,
        eval_plan: BatchPlan,
    ):
        self._config = config
        self._directory = directory
        self._strategy = strategy
        self._data = data
        self._train_plan = train_plan
        self._eval_plan = eval_plan
        tf_keras.mixed_precision.set_global_policy(
            "mixed_bfloat16" if config.precision == "bfloat16" else "float32"
        )
        tf_keras.utils.set_random_seed(config.seed)
        tf_keras.backend.experimental.enable_tf_random_generator()
        with strategy.scope():
            self._model = model.build_pretrainer(bert, len(data.words))
            self._optimizer = build_optimizer(config)
            self._optimizer.build(self._model.trainable_variables)
        self._global_step = self._optimizer.iterations
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=self._model, optimizer=self._optimizer),
            directory.join("checkpoints"),
            max_to_keep=config.keep_checkpoints,
        )

    @property
    def step(self) -> int:
        """Updates made so far."""
        return int(self._global_step.numpy())

    def train(self) -> None:
        """Trains to the end, evaluating and saving on the way; goes on where it stopped."""
        config = self._config
        if self._is_done():
            return
        metrics = MetricsLog(self._directory.join("metrics.jsonl"), self.step)
        with (
            contextlib.closing(metrics),
            console.progress("Training", config.num_train_steps, " steps", self.step) as bar,
            stop_signals() as stop_requested,
        ):
            actions = LoopActions(
                self._global_step,
                build_schedule(config),
                self._train_plan.global_batch_size,
                metrics,
                bar,
                stop_requested,
                self._data.train.corrupt_records if config.skip_corrupt_records else None,
            )
            controller = self._controller(
                trainer=self._trainer(),
                train_actions=[actions],
                steps_per_loop=config.steps_per_loop,
                summary_dir=self._directory.join("tensorboard/train"),
            )
            try:
                eval_output = self._train_loop(controller, actions)
            except Interrupted as signal_name:
                self._save()
                bar.close()
                console.say(
                    f"{signal_name}: stopped after {self.step} of {config.num_train_steps} updates and "
                    "saved. Repeat the command to go on."
                )
                return
        self._finish(metrics.last, eval_output)

    def _is_done(self) -> bool:
        """Restores the newest checkpoint, if any; tells whether nothing is left to do.

        Raises:
          InputError: there are checkpoints and none of them can be told to be the newest.
        """
        newest, done = self._manager.latest_checkpoint, self._directory.read_json("summary.json")
        if newest is None:
            if done or tf.io.gfile.glob(f"{self._manager.directory}/ckpt-*.index"):
                raise InputError(
                    f"--output_dir={self._directory.path}: expected the file checkpoints/checkpoint "
                    "to name the newest checkpoint. Received: no such file, or a damaged one"
                )
            return False
        self._restore(newest)
        evaluated = self._data.held_out is None or (done or {}).get("evaluated") == self._evaluated
        if not (done and evaluated and self.step == self._config.num_train_steps):
            console.say(f"Going on from {newest}")
            return False
        console.say(f"This run is done: {self.step} updates.")
        self._say_result(done)
        return True

    def _trainer(self) -> Trainer:
        config = self._config
        batches = self._strategy.distribute_datasets_from_function(
            self._data.train_input(self._train_plan, config.seed, self.step)
        )
        step = PretrainingStep(
            self._model,
            self._optimizer,
            generators=model.dropout_generators(self._model),
            seed=config.seed,
            accumulation_steps=self._train_plan.accumulation_steps,
            clip_global_norm=config.clip_global_norm,
            jit_compile=False,
        )
        return Trainer(self._strategy, step, iter(batches))

    def _train_loop(self, controller: orbit.Controller, actions: LoopActions):
        """Trains from one save or evaluation to the next; returns the last evaluation."""
        config, output = self._config, None
        end = config.num_train_steps
        while self.step < end:
            stops = [_next(self.step, n, end) for n in (config.save_every_steps, self._eval_every)]
            try:
                with console.quiet():
                    controller.train(min(stops), checkpoint_at_completion=False)
            except input_pipeline.FAILURES as error:
                found = self._data.train_fault(error, self._train_plan, config.seed, self.step)
                raise found from None
            if _is_due(self.step, config.save_every_steps, end):
                self._save()
            if self._data.held_out is not None and _is_due(self.step, self._eval_every, end):
                output = self._evaluate(controller)
            if self.step < end:
                actions.restart_clock()
                actions.obey_signals()
        if output is None and self._data.held_out is not None:
            output = self._evaluate(controller)
        return output

    @property
    def _eval_every(self) -> int:
        return self._config.eval_every_steps if self._data.held_out is not None else 0

    @property
    def _evaluated(self) -> dict[str, Any]:
        """What the evaluation in `summary.json` is of; other files or steps make it anew."""
        held_out = self._data.held_out
        return {
            "eval_files": held_out.fingerprint if held_out else None,
            "eval_steps": self._config.eval_steps,
        }

    def _save(self) -> None:
        # The loss of a step is that before its update: look at what would be saved.
        if not all(_is_finite(variable) for variable in self._model.trainable_variables):
            raise diverged(self.step)
        # Orbit's own saving starts at the first loop, whatever the interval.
        with writing(self._manager.directory):
            self._manager.save(checkpoint_number=self.step)

    def _controller(self, **arguments) -> orbit.Controller:
        if self._data.held_out is not None:
            arguments["evaluator"] = evaluation.Evaluator(
                self._strategy,
                self._model,
                self._data.eval_input(self._eval_plan),
            )
            if self._config.mode != "eval":
                arguments["eval_summary_dir"] = self._directory.join("tensorboard/eval")
        with console.quiet():
            return orbit.Controller(
                global_step=self._global_step, strategy=self._strategy, **arguments
            )

    def _evaluate(self, controller: orbit.Controller) -> dict[str, float]:
        held_out = self._data.held_out
        steps = math.ceil(held_out.num_records / self._eval_plan.global_batch_size)
        if self._config.eval_steps:
            steps = min(steps, self._config.eval_steps)
        try:
            with console.quiet():
                output = controller.evaluate(steps)
        except input_pipeline.FAILURES as error:
            raise self._data.eval_fault(error) from None
        output = {k: float(v) for k, v in output.items() if k != "steps_per_second"}
        if not math.isfinite(output["loss"]):
            raise diverged(self.step)
        console.say(
            f"Held out after {self.step} updates: masked-LM loss {output['mlm_loss']:.3f}, accuracy "
            f"{output['mlm_accuracy']:.2%}; next-sentence accuracy {output['nsp_accuracy']:.2%}"
        )
        return output

    def _restore(self, checkpoint: str, flag: str = "output_dir") -> None:
        """Restores model, optimizer and step.

        Raises:
          InputError: the checkpoint is damaged or that of another model.
        """
        try:
            with self._strategy.scope():
                status = self._manager.checkpoint.restore(checkpoint)
            status.assert_existing_objects_matched()
        except Exception as error:
            # TensorFlow's reader raises OpError, IndexError, RuntimeError and others.
            cause = " ".join(str(error).split())[:200]
            raise InputError(
                f"--{flag}: expected a checkpoint of this model and optimizer. Received: "
                f"{checkpoint}, which cannot be read ({cause})"
            ) from None

    def evaluate_checkpoint(self) -> None:
        """Evaluates `--eval_checkpoint`, or the newest one, and prints the result.

        Raises:
          InputError: there is no such checkpoint, or it is damaged or that of another model.
        """
        given = self._config.eval_checkpoint.removesuffix(".index")
        flag = "eval_checkpoint" if given else "output_dir"
        path = given or self._manager.latest_checkpoint
        if path is None or not tf.io.gfile.exists(f"{path}.index"):
            raise InputError(
                f"--{flag}={path or self._directory.path}: expected a checkpoint. Received: none there"
            )
        self._restore(path, flag)
        output = self._evaluate(self._controller())
        console.say(f"Checkpoint: {path}")
        for name, value in output.items():
            console.say(f"  {name}: {value:.6f}")

    def _finish(self, last: dict[str, float], eval_output: dict[str, float] | None) -> None:
        summary: dict[str, Any] = {
            "step": self.step,
            "checkpoint": self._manager.latest_checkpoint,
            "train": last,
            "evaluated": self._evaluated,
        }
        if eval_output is not None:
            token = evaluation.most_frequent_label(self._data.train)
            summary["eval"] = {
                **eval_output,
                "most_frequent_token": self._data.words.tokens[token],
                "most_frequent_token_accuracy": evaluation.constant_accuracy(
                    token, self._data.held_out
                ),
            }
        self._directory.write_json("summary.json", summary)
        self._say_result(summary)

    def _say_result(self, summary: dict[str, Any]) -> None:
        result = summary.get("eval")
        if result:
            console.say(
                f"Held-out masked-LM accuracy: {result['mlm_accuracy']:.2%}. Always guessing the most "
                f"frequent token, {result['most_frequent_token']!r}: "
                f"{result['most_frequent_token_accuracy']:.2%}."
            )
        console.say(f"Checkpoint: {summary['checkpoint']}")
        console.say(f"Summary: {self._directory.join('summary.json')}")


def _is_finite(variable: tf.Variable) -> bool:
    return bool(tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(variable))))


def _next(step: int, interval: int, end: int) -> int:
    """The next multiple of an interval, or the end; an interval of 0 is none."""
    return min(end, (step // interval + 1) * interval) if interval else end


def _is_due(step: int, interval: int, end: int) -> bool:
    return step == end or bool(interval and step % interval == 0)
