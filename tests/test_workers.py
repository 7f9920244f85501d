"""Two processes train together: as one with two replicas, and what happens when one is killed.

`python -m tests.test_workers FOLDER RECORDS` is one of the processes; TF_CONFIG says which.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from pretraining import input_pipeline, model, workers
from pretraining.batch_plan import BatchPlan
from pretraining.errors import InputError
from pretraining.model import BertConfig
from pretraining.record_checks import RecordCheck
from pretraining.train_step import PretrainingStep, SkippedSteps, Trainer
from tests.test_records import FORMAT
from tpu import cluster, strategy

# With dropout: each replica draws the same masks, in whichever process it is.
BERT = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
STEPS, LAST_STEP = 2, 4


class Training:
    """A few updates of a small model, from the checkpoint in a folder if there is one."""

    def __init__(self, made: tf.distribute.Strategy, folder: str, records: str):
        tf_keras.utils.set_random_seed(0)
        tf_keras.backend.experimental.enable_tf_random_generator()
        with made.scope():
            self.network = model.build_pretrainer(BERT, 65)
            self.optimizer = tf_keras.optimizers.SGD(1.0)
            self.optimizer.build(self.network.trainable_variables)
            skipped = SkippedSteps()
        self.state = tf.train.Checkpoint(model=self.network, optimizer=self.optimizer)
        newest = tf.train.latest_checkpoint(folder)
        if newest:
            self.state.restore(newest).assert_existing_objects_matched()
        plan = BatchPlan(global_batch_size=8, num_replicas=made.num_replicas_in_sync)
        train = RecordCheck(record_format=FORMAT, flag="--input_files").run(
            [f"{records}/train-{i}.tfrecord" for i in range(3)]
        )
        batches = made.distribute_datasets_from_function(
            lambda context: input_pipeline.train_dataset(train, FORMAT, plan, 3, self.step, context)
        )
        step = PretrainingStep(
            self.network,
            self.optimizer,
            skipped=skipped,
            seed=3,
            accumulation_steps=1,
            clip_global_norm=0.5,
            jit_compile=True,
        )
        self.trainer = Trainer(made, step, iter(batches))

    @property
    def step(self) -> int:
        return int(self.optimizer.iterations.numpy())

    def run(self) -> None:
        self.trainer.train(tf.constant(STEPS))


def work(folder: str, records: str) -> None:
    """The first start: trains, saves, then worker 1 is killed. The second one goes on to the end."""
    made = strategy.create_strategy()
    with workers.together(made):
        chief, index = workers.is_chief(made), int(not workers.is_chief(made))
        training = Training(made, folder, records)
        workers.agree(made, training.step, "the step")
        facts = {"workers": workers.count(made), "device": strategy.describe(made)}
        facts["one asks"] = workers.any_worker(made, index == 1)
        facts["none asks"] = workers.any_worker(made, False)
        for name, value in (("number", 7 + index), ("flags", {"a": 1, "b": "ä" * (index + 1)})):
            try:
                workers.agree(made, value, "this")
            except InputError as error:
                facts[name] = str(error)
        training.run()
        if training.step < LAST_STEP:
            if chief:
                training.state.save(f"{folder}/ckpt")
            workers.any_worker(made, False)  # saved
            if not chief:
                os.kill(os.getpid(), signal.SIGKILL)
            training.run()
    pathlib.Path(f"{folder}/{index}.json").write_text(json.dumps(facts))
    np.savez(f"{folder}/{index}.npz", *training.network.get_weights())


def free_addresses(count: int) -> list[str]:
    servers = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{server.getsockname()[1]}" for server in servers]
    for server in servers:
        server.close()
    return addresses


def tf_config(addresses: list[str], index: int) -> str:
    return json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    )


def start_both(addresses: list[str], *arguments: str) -> list[subprocess.CompletedProcess]:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_workers", *arguments],
            env={**os.environ, "TF_CONFIG": tf_config(addresses, index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended = []
    for process in started:
        out, errors = process.communicate(timeout=240)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, errors))
    return ended


def test_two_processes_one_killed_both_restarted(small_records, tmp_path):
    addresses, arguments = free_addresses(2), (str(tmp_path), str(small_records.folder))
    survivor, killed = start_both(addresses, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert survivor.returncode == 2, survivor.stderr
    lines = survivor.stderr.splitlines()
    assert lines[-1].startswith(f"error: a worker was lost: worker 1 at {addresses[1]} ("), lines
    assert "Start all workers again" in lines[-1]
    assert not list(tmp_path.glob("*.npz"))

    for process in start_both(addresses, *arguments):
        assert process.returncode == 0, process.stderr
    two = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    whole = Training(two, str(tmp_path / "none"), str(small_records.folder))
    before = whole.network.get_weights()
    while whole.step < LAST_STEP:
        whole.run()
    weights = whole.network.get_weights()
    assert any((a != b).any() for a, b in zip(before, weights, strict=True))
    for index in range(2):
        trained = np.load(tmp_path / f"{index}.npz")
        for name, expected in zip(trained.files, weights, strict=True):
            np.testing.assert_allclose(trained[name], expected, rtol=0, atol=1e-6)
        facts = json.loads((tmp_path / f"{index}.json").read_text())
        assert facts == {
            "workers": 2,
            "device": "2 replicas on CPU in 2 workers",
            "one asks": True,
            "none asks": False,
            "number": "TF_CONFIG: expected all workers to agree on this. Received: "
            "7 in worker 0, 8 in worker 1",
            "flags": "TF_CONFIG: expected all workers to agree on this. Received: "
            '{"b": "\\u00e4"} in worker 0, {"b": "\\u00e4\\u00e4"} in worker 1',
        }


def test_one_process_asks_nobody():
    alone = tf.distribute.OneDeviceStrategy("/cpu:0")
    assert workers.is_chief(alone)
    assert workers.count(alone) == 1
    assert workers.any_worker(alone, True)
    assert not workers.any_worker(alone, False)
    workers.agree(alone, 3, "the step")
    failure = tf.errors.UnavailableError(None, None, "Collective ops is aborted by: Socket closed")
    with pytest.raises(tf.errors.UnavailableError), workers.together(alone):
        raise failure
    assert workers.lost_worker(alone, failure) is None


TWO = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "a JSON object"),
        ("[1]", "lists of addresses by job under cluster"),
        ({"cluster": {"worker": "a:1"}}, "lists of addresses by job under cluster"),
        ({"cluster": {"worker": ["a:1"], "ps": ["b:2"]}}, "workers and at most one chief"),
        ({"cluster": {"chief": ["a:1", "b:2"]}}, "workers and at most one chief"),
        ({"cluster": {"worker": ["a", "b:2"]}}, "host:port as each address"),
        ({"cluster": {"worker": ["a:1", "a:1"]}}, "another address for each worker"),
        ({"cluster": TWO}, "type and index of this process under task: worker 0 to 1"),
        ({"cluster": TWO, "task": {"type": "worker", "index": 2}}, "worker 0 to 1"),
        ({"cluster": TWO, "task": {"type": "chief", "index": 0}}, "worker 0 to 1"),
    ],
)
def test_a_tf_config_that_makes_no_sense_is_refused(config, expected, monkeypatch):
    text = config if isinstance(config, str) else json.dumps(config)
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(strategy.DeviceError) as raised:
        strategy.create_strategy()
    message = str(raised.value)
    assert message.startswith("TF_CONFIG: expected ")
    assert expected in message
    assert "Received: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "config",
    [
        "",
        " ",
        "{}",
        '{"cluster": {}}',
        '{"cluster": {"chief": ["a:1"]}, "task": {"type": "chief", "index": 0}}',
    ],
)
def test_a_tf_config_of_one_machine_changes_nothing(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    assert isinstance(strategy.create_strategy(), tf.distribute.OneDeviceStrategy)


def test_the_chief_is_worker_0(monkeypatch):
    config = {"cluster": {"worker": ["b:2"], "chief": ["a:1"]}}
    config["task"] = {"type": "worker", "index": "0"}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert cluster.read_cluster() == cluster.Cluster(("a:1", "b:2"), 1)


@pytest.mark.parametrize("flags", [{"tpu": "local"}, {"virtual_devices": 2}])
def test_a_cluster_goes_with_no_other_choice_of_device(flags, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(free_addresses(2), 0))
    with pytest.raises(strategy.DeviceError, match="expected no TF_CONFIG beside it"):
        strategy.create_strategy(**flags)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        monkeypatch.setenv("TF_CONFIG", tf_config([address, *free_addresses(1)], 0))
        with pytest.raises(strategy.DeviceError, match=f"free port .* {address}.* in use"):
            strategy.create_strategy()


def test_a_chief_whose_workers_never_come_ends_with_a_message():
    addresses = free_addresses(2)
    program = (
        "from tpu import cluster, strategy\n"
        "cluster.WORKERS_SECONDS, cluster.WORKERS_NOTICE_SECONDS = 1, 0.5\n"
        "strategy.create_strategy()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TF_CONFIG": tf_config(addresses, 0)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL  # nothing gentler stops TensorFlow here
    peer = f"worker 1 at {addresses[1]} (Connection refused)"
    lines = done.stderr.splitlines()
    assert f"Waiting up to 1 s for {peer}" in lines
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith(
        f"error: TF_CONFIG: no start of all workers within 1 s; silent: {peer}. Tried: "
    )


def main() -> None:
    status = 0
    try:
        work(*sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
