"""A run from its configuration to its end: device, data, plan, then training or evaluation."""

import contextlib
import dataclasses
from typing import Any

import tensorflow as tf

from pretraining import console, files, found_data, model
from pretraining.batch_plan import BatchPlan, plan_evaluation, plan_training
from pretraining.config import Config
from pretraining.data import Data, given_files, read_data
from pretraining.errors import InputError
from pretraining.run_directory import RunDirectory, writing
from pretraining.session import Session
from tpu.strategy import DeviceError, create_strategy, describe


@files.explained()
def run(config: Config) -> None:
    """Does what the configuration asks for.

    Raises:
      InputError: something given cannot work; nothing was written.
    """
    directory = RunDirectory(config.output_dir)
    console.say(f"Output: {directory.path}")
    try:
        strategy = create_strategy(
            config.tpu, config.tpu_zone, config.gcp_project, config.virtual_devices
        )
    except DeviceError as error:
        raise InputError(str(error)) from None
    train_plan = plan_training(config, strategy.num_replicas_in_sync)
    eval_plan = plan_evaluation(config, train_plan)
    bert = model.MODELS[config.model]
    if config.bert_config_file:
        bert = model.read_bert_config(config.bert_config_file)
    if bert.max_position_embeddings < config.max_seq_length:
        raise InputError(
            f"--max_seq_length={config.max_seq_length}: expected at most the model's "
            f"{bert.max_position_embeddings} positions"
        )
    identity = {
        **config.identity,
        "train_batch_size": train_plan.global_batch_size,
        "model": dataclasses.asdict(bert),
    }
    own_data = bool(config.vocab_file or config.eval_files)
    data = None
    if own_data:  # all of it is looked at before anything is written
        data = read_data(given_files(config), config, bert, directory)
        directory.check_identity(_with_data(identity, data), config.mode)
    else:
        _check_own_folder(config, directory, identity)
    if config.mode != "eval":
        _say_plan(config, strategy, train_plan, eval_plan)
    if config.dry_run:
        return
    if config.mode != "eval":
        directory.create()
    with directory.lock() if config.mode != "eval" else contextlib.nullcontext():
        if data is None:
            with writing(directory.join("data")):
                own_files = found_data.prepare(config)
            data = read_data(own_files, config, bert, directory)
            directory.check_identity(_with_data(identity, data), config.mode)
        if config.mode != "eval":
            data.remember(directory)
        session = Session(config, directory, strategy, bert, data, train_plan, eval_plan)
        if config.mode == "eval":
            session.evaluate_checkpoint()
            return
        directory.write_config(
            config,
            _with_data(identity, data),
            {"batch_plan": dataclasses.asdict(train_plan), "strategy": describe(strategy)},
        )
        session.train()


def _with_data(identity: dict[str, Any], data: Data) -> dict[str, Any]:
    return {
        **identity,
        "vocab_file": data.words.sha256,
        "input_files": data.train.fingerprint if data.train else None,
    }


def _check_own_folder(config: Config, directory: RunDirectory, identity: dict[str, Any]) -> None:
    """Refuses another run's folder before text is looked for, which takes half a minute."""
    then = directory.read_config()
    if then is not None:
        for name in ("input_files", "eval_files"):
            if then["flags"].get(name):
                raise InputError(
                    f"--{name}: expected --{name}={then['flags'][name]} of the run in "
                    f"{directory.path}, or another --output_dir. Received: nothing"
                )
        known = {name: then["identity"].get(name) for name in ("vocab_file", "input_files")}
        directory.check_identity({**identity, **known}, config.mode)
    elif config.mode == "eval":
        raise InputError(
            f"--output_dir={directory.path}: expected a run to evaluate. Received: no config.json"
        )


def _say_plan(
    config: Config, strategy: tf.distribute.Strategy, train: BatchPlan, held_out: BatchPlan
) -> None:
    console.say(f"Device: {describe(strategy)}, {config.precision}")
    console.say(f"Batch: {train}; evaluation {held_out}")
    console.say(
        f"Plan: {config.num_train_steps} updates with {config.optimizer}, learning rate 0 to "
        f"{config.learning_rate} in {config.warmup_steps}, then to {config.end_learning_rate} by a "
        f"polynomial of power {config.poly_power}"
    )
