"""The whole plan of a run: phases, batches, learning rate, passes over the data, checkpoints, disk."""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from pretraining import console, model_flops
from pretraining.batch_plan import BatchPlan, plan_evaluation, plan_training
from pretraining.config import Config
from pretraining.data import Data
from pretraining.model import BertConfig
from pretraining.optimization import build_schedule
from pretraining.phases import Phase
from pretraining.recipes import RECIPES
from tpu.strategy import describe

# Float32 weights, gradients and up to two moments.
STATE_BYTES_PER_PARAMETER = 16
# What is left for activations beside XLA's own buffers, the input and TensorFlow.
USABLE = 0.7
SLOTS = {"lamb": 2, "adamw": 2, "adam": 2, "lars": 1, "momentum": 1, "adagrad": 1}
CURVE_COLUMNS, CURVE_LEVELS = 60, "▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """A phase and how its batches are spread.

    Attributes:
      phase: its lengths and steps.
      train: the batches of training.
      held_out: the batches of evaluation.
    """

    phase: Phase
    train: BatchPlan
    held_out: BatchPlan


def plan_phases(
    config: Config, num_replicas: int, replica_bytes: int, bert: BertConfig, vocab_size: int
) -> tuple[PhasePlan, ...]:
    """Works out the batches of every phase.

    Args:
      config: the flags.
      num_replicas: that share the batches.
      replica_bytes: memory of each.
      bert: the dimensions, which decide how many rows fit into memory.
      vocab_size: tokens; roughly will do.

    Raises:
      InputError: a global batch does not divide by replicas and micro-batches.
    """
    parameters = model_flops.parameter_count(bert, vocab_size)
    memory = USABLE * replica_bytes - STATE_BYTES_PER_PARAMETER * parameters
    plans = []
    for phase in config.phases:
        row = model_flops.activation_bytes(
            bert, phase.max_seq_length, phase.max_predictions_per_seq, vocab_size, config.precision
        )
        train = plan_training(phase, num_replicas, max(1, int(memory // row)))
        held_out = plan_evaluation(config.eval_batch_size, train)
        plans.append(PhasePlan(phase=phase, train=train, held_out=held_out))
    return tuple(plans)


def say_plan(
    config: Config,
    strategy: tf.distribute.Strategy,
    bert: BertConfig,
    vocab_size: int,
    plans: Sequence[PhasePlan],
    data: Sequence[Data] | None,
) -> None:
    """Prints everything that will happen.

    Args:
      config: the flags.
      strategy: where it runs.
      bert: the dimensions.
      vocab_size: tokens; roughly will do.
      plans: the batches of every phase.
      data: the records of every phase, where they are there already.
    """
    recipe = RECIPES[config.recipe]
    console.say(f"Recipe: {config.recipe}, {recipe.about}. {recipe.reaches}")
    for source in recipe.sources:
        console.say(f"  {source}")
    missing = [
        name
        for name in ("input_files", "eval_files", "vocab_file", *recipe.needs)
        if not getattr(config, name)
    ]
    if missing and not recipe.finds_data:
        console.say(
            f"To run it: --{' --'.join(missing)}; figures of size are for {vocab_size:,} tokens"
        )
    if config.init_checkpoint:
        console.say(f"Weights: those of {config.init_checkpoint}")
    console.say(f"Device: {describe(strategy)}, {config.precision}")
    for i, plan in enumerate(plans):
        phase = plan.phase
        console.say(
            f"Phase {phase.number} of {len(plans)}: updates {phase.first_step + 1} to {phase.end_step}, "
            f"{phase.max_seq_length} tokens, up to {phase.max_predictions_per_seq} masked"
        )
        console.say(f"  Batch: {plan.train}; evaluation {plan.held_out}")
        rows = phase.num_train_steps * plan.train.global_batch_size
        records = data[i].train if data is not None else None
        passes = (
            f", {rows / records.num_records:.3g} passes over {records.num_records:,} records"
            if records
            else ""
        )
        console.say(f"  Data: {rows:,} rows{passes}")
    _say_schedule(config)
    _say_disk(config, model_flops.parameter_count(bert, vocab_size))


def _say_schedule(config: Config) -> None:
    parts = config.phases if config.rewarmup else config.phases[:1]
    for phase in parts:
        i = phase.number - 1
        console.say(
            f"Learning rate{f' of phase {phase.number}' if len(parts) > 1 else ''}: "
            f"{config.optimizer}, warm-up to {config.learning_rate[i]:.4g} in "
            f"{config.warmup_steps[i] + config.warmup_first_step[i]} updates"
            f"{f' (of {config.warmup_steps[i]})' if config.warmup_first_step[i] else ''}, then to {config.end_learning_rate[i]:.4g} by a "
            f"polynomial of power {config.poly_power[i]:g}"
        )
    schedule = build_schedule(config)
    steps = [int(config.total_steps * (c + 0.5) / CURVE_COLUMNS) for c in range(CURVE_COLUMNS)]
    rates = [float(schedule(step)) for step in steps]
    top = len(CURVE_LEVELS) - 1
    curve = "".join(CURVE_LEVELS[round(top * rate / max(rates))] for rate in rates)
    console.say(f"  0 {curve} {config.total_steps} updates")


def saved_steps(config: Config) -> set[int]:
    """Returns the steps with a checkpoint: at every interval, and at the end of a phase."""
    saves = {phase.end_step for phase in config.phases}
    if config.save_every_steps:
        saves.update(range(config.save_every_steps, config.total_steps, config.save_every_steps))
    return saves


def _say_disk(config: Config, parameters: int) -> None:
    size = 4 * parameters * (1 + SLOTS[config.optimizer])
    saves = saved_steps(config)
    kept = set(sorted(saves)[-config.keep_checkpoints :])
    if config.keep_every_steps:
        kept |= {step for step in saves if step % config.keep_every_steps == 0}
    console.say(
        f"Checkpoints: {len(saves)} of {size / 1e6:,.1f} MB ({parameters:,} parameters), "
        f"{len(kept)} kept; disk: up to {size * (len(kept) + 1) / 1e6:,.1f} MB"
    )
