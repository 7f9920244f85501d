"""A run from its configuration to its end: device, plan, data, then training or evaluation."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from pretraining import console, files, found_data, model, workers
from pretraining.config import Config
from pretraining.data import Data, given_files, read_data
from pretraining.dimensions import bert_of, vocab_size_of
from pretraining.errors import InputError
from pretraining.recipes import RECIPES
from pretraining.remote_hosts import check_paths, lost_tpu
from pretraining.run_directory import RunDirectory, writing
from pretraining.run_lock import run_lock
from pretraining.run_plan import PhasePlan, plan_phases, say_plan
from pretraining.session import Session
from tpu.device_memory import replica_memory
from tpu.strategy import DeviceError, accelerator_type, create_strategy, describe

STOPPED = 75  # exit status of a run that was asked to stop and has saved: EX_TEMPFAIL, try again


@files.explained()
def run(config: Config) -> int:
    """Does what the configuration asks for.

    Returns:
      0, or `STOPPED` where the run is not done because it was asked to stop.

    Raises:
      InputError: something given cannot work; nothing was written.
    """
    if config.preflight:
        from pretraining import preflight  # needs an extra of its own

        return preflight.run(config)
    directory = RunDirectory(config.output_dir)
    console.say(f"Output: {directory.path}")
    try:
        strategy = create_strategy(
            config.tpu, config.tpu_zone, config.gcp_project, config.virtual_devices
        )
    except DeviceError as error:
        raise InputError(str(error)) from None
    check_paths(config, strategy)
    if ":GPU:" in strategy.extended.worker_devices[0].upper():
        tf.config.experimental.enable_op_determinism()  # or no restart would be exact
    bert = bert_of(config)
    own_data = bool(config.vocab_file or config.eval_files)
    tokens = vocab_size_of(config, bert)
    if config.init_checkpoint and not files.is_file(
        f"{config.init_checkpoint.removesuffix('.index')}.index", "--init_checkpoint"
    ):
        raise InputError(
            f"--init_checkpoint={config.init_checkpoint}: expected a checkpoint, a path that ends in "
            "ckpt-<step>. Received: none there"
        )
    slice_name = accelerator_type(config.tpu, config.tpu_zone, config.gcp_project)
    memory = replica_memory(strategy, slice_name)
    plans = plan_phases(config, strategy.num_replicas_in_sync, memory, bert, tokens)
    identity = {
        **config.identity,
        "train_batch_size": _plain([plan.train.global_batch_size for plan in plans]),
        "model": dataclasses.asdict(bert),
    }
    data = None
    if own_data:  # all of it is looked at before anything is written
        data = _read(config, bert, directory, [given_files(config, p) for p in config.phases])
        directory.check_identity(_with_data(identity, data), config.mode)
    else:
        _check_own_folder(config, strategy, directory, identity)
    if config.mode != "eval" and workers.is_chief(strategy):
        say_plan(config, strategy, bert, tokens, plans, data)
    if config.dry_run:
        return 0
    if config.mode == "eval":
        data = data or _found(config, bert, directory, identity)
        with workers.together(strategy):
            Session(config, directory, strategy, bert, data, plans).evaluate_checkpoint()
        return 0
    return _train(config, directory, strategy, bert, plans, data, identity)


def _train(
    config: Config,
    directory: RunDirectory,
    strategy: tf.distribute.Strategy,
    bert: model.BertConfig,
    plans: Sequence[PhasePlan],
    data: Sequence[Data] | None,
    identity: dict[str, Any],
) -> int:
    chief = workers.is_chief(strategy)
    if chief:
        directory.create()
    with run_lock(directory.path) if chief else contextlib.nullcontext() as lock:
        data = data or _found(config, bert, directory, identity)
        if chief:
            for each in data:
                each.remember(directory)
        identity = _with_data(identity, data)
        with workers.together(strategy):
            session = Session(config, directory, strategy, bert, data, plans)
            done = session.restore()
            workers.agree(strategy, identity, "the flags and the data of the run")
            if chief:
                directory.write_config(config, identity, _facts(plans, strategy, config))
            try:
                done = done or session.train(lock.check if lock else lambda: None)
            except (tf.errors.OpError, InputError) as error:
                if lost := lost_tpu(strategy, error):
                    raise lost from None
                raise
    return 0 if done else STOPPED


def _found(
    config: Config, bert: model.BertConfig, directory: RunDirectory, identity: dict[str, Any]
) -> list[Data]:
    """Returns the data that is found on this machine, prepared once."""
    with writing(directory.join("data")):
        own_files = found_data.prepare(config)
    data = _read(config, bert, directory, own_files)
    directory.check_identity(_with_data(identity, data), config.mode)
    return data


def _read(config: Config, bert: model.BertConfig, directory: RunDirectory, found) -> list[Data]:
    return [
        read_data(each, config, phase, bert, directory)
        for phase, each in zip(config.phases, found, strict=True)
    ]


def _plain(values: Sequence[Any]) -> Any:
    """One value for a run of one phase, else a list."""
    return values[0] if len(values) == 1 else list(values)


def _with_data(identity: dict[str, Any], data: Sequence[Data]) -> dict[str, Any]:
    prints = [each.train.fingerprint if each.train else None for each in data]
    return {**identity, "vocab_file": data[0].words.sha256, "input_files": _plain(prints)}


def _facts(
    plans: Sequence[PhasePlan], strategy: tf.distribute.Strategy, config: Config
) -> dict[str, Any]:
    """What was worked out from the flags."""
    return {
        "batch_plan": _plain([dataclasses.asdict(plan.train) for plan in plans]),
        "phases": [dataclasses.asdict(plan.phase) for plan in plans],
        "strategy": describe(strategy),
        "recipe": {
            "about": RECIPES[config.recipe].about,
            "reaches": RECIPES[config.recipe].reaches,
        },
    }


def _check_own_folder(
    config: Config,
    strategy: tf.distribute.Strategy,
    directory: RunDirectory,
    identity: dict[str, Any],
) -> None:
    """Refuses another run's folder before text is looked for, which takes half a minute."""
    if workers.count(strategy) > 1:
        raise InputError(
            "--input_files: expected where several workers train (TF_CONFIG). Received: nothing"
        )
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
