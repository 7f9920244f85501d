"""Where a run goes, and what the user reads when there is no such place."""

import contextlib
import socket
import subprocess
import sys
import threading

import pytest
import tensorflow as tf

from tests.cloud_server import cloud  # noqa: F401
from tpu import failures, local_tpu, strategy


def test_no_flag_means_this_machine():
    made = strategy.create_strategy()
    assert made.num_replicas_in_sync == 1
    assert strategy.describe(made) == "1 replica on CPU"


def test_virtual_devices_are_replicas():
    made = strategy.create_strategy(virtual_devices=2)
    assert isinstance(made, tf.distribute.MirroredStrategy)
    assert strategy.describe(made) == "2 replicas on CPU"


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tpu": "local"}, ["--tpu=local", "Tried", "Check", "TPU VM", "libtpu"]),
        ({"tpu": "grpc://127.0.0.1:{port}"}, ["nothing answers", "Tried", "Check", "READY"]),
        ({"tpu": "grpc://127.0.0.1"}, ["expected grpc://host:port", "Received"]),
        ({"tpu": "no-such-tpu"}, ["--tpu=no-such-tpu", "Tried", "Check", "--tpu_zone"]),
        ({"tpu": "local", "virtual_devices": 2}, ["--virtual_devices=2", "Received: --tpu=local"]),
    ],
)
def test_a_missing_tpu_is_reported_soon_in_one_line(arguments, words):
    arguments = {
        k: v.format(port=closed_port()) if isinstance(v, str) else v for k, v in arguments.items()
    }
    with pytest.raises(strategy.DeviceError) as raised:
        strategy.create_strategy(**arguments)
    text = str(raised.value)
    assert "\n" not in text
    for word in words:
        assert word in text


MISSING = {
    "a name": {"tpu": "nonexistent"},
    "no credentials": {"tpu": "nonexistent", "zone": "us-central1-a", "project": "proj"},
    "this machine": {"tpu": "local"},
    "an address": {"tpu": "grpc://127.0.0.1:1"},
}


def test_each_missing_tpu_has_a_message_of_its_own(monkeypatch):
    monkeypatch.delenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    messages = set()
    for arguments in MISSING.values():
        with pytest.raises(strategy.DeviceError) as raised:
            strategy.create_strategy(**arguments)
        text = str(raised.value).removeprefix(f"--tpu={arguments['tpu']}: ")
        messages.add(text.partition(":")[0].partition(".")[0])
    assert len(messages) == len(MISSING), messages


def test_a_name_becomes_the_addresses_of_its_workers(cloud, monkeypatch):  # noqa: F811
    """TensorFlow's resolver gets no name to look up by another version of the API."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = {"ipAddress": "127.0.0.1", "port": server.getsockname()[1]}
        runtime = f"tpu-vm-tf-{tf.__version__}-pod-pjrt"
        cloud.add_node("pod", networkEndpoints=[endpoint, endpoint], runtimeVersion=runtime)
        monkeypatch.setattr(strategy, "_connected", lambda target, *_: target)
        target = strategy.create_strategy("pod", "us-central1-a", "proj")
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=target)
    address = f"127.0.0.1:{endpoint['port']}"
    assert resolver.cluster_spec().as_dict() == {"worker": [address, address]}


def test_a_tpu_that_is_not_ready_is_not_connected_to(cloud):  # noqa: F811
    cloud.add_node("pod", "CREATING")
    with pytest.raises(strategy.DeviceError, match="--tpu=pod: expected a TPU that is READY"):
        strategy.create_strategy("pod", "us-central1-a", "proj")


def test_a_tpu_vm_with_the_wrong_build_is_told_so(monkeypatch):
    monkeypatch.setattr(local_tpu, "read_machine", lambda: local_tpu.Machine(4, "v3-8"))
    with pytest.raises(strategy.DeviceError, match=r"Received: tensorflow 2.* pip uninstall -y"):
        strategy.create_strategy("local")


def test_local_that_passes_all_checks_and_fails_is_explained(monkeypatch):
    """TensorFlow's own words, from this machine, which has no TPU."""
    monkeypatch.setattr(strategy, "_checked_local", lambda: "local")
    with pytest.raises(strategy.DeviceError, match="the TensorFlow that answers has no TPU"):
        strategy.create_strategy("local")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("The TPU is already in use by process with pid 7"), "another process holds"),
        (OSError("open(/dev/accel0): Device or resource busy"), "another process holds"),
        (tf.errors.NotFoundError(None, None, "Op type not registered 'X'"), "do not understand"),
        (tf.errors.UnavailableError(None, None, "failed to connect"), "connection was lost"),
        (ValueError("something\nnew"), "no TPU found (ValueError: something new). as told"),
    ],
)
def test_what_tensorflow_says_is_explained(error, words):
    text = str(failures.from_tensorflow(error, "as told"))
    assert words in text
    assert "\n" not in text


def test_a_server_that_never_answers_ends_the_process_with_a_message():
    """A listener that accepts and stays silent: a gRPC channel to it waits without limit."""
    program = (
        "import sys; from tpu import strategy; strategy.CONNECT_SECONDS = 3\n"
        "strategy.create_strategy(sys.argv[1])"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            kept = []
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        address = f"grpc://127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", program, address], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == strategy.NO_ANSWER_EXIT_CODE
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert f"--tpu={address}: no answer within 3 s. Tried: " in lines[0]
    assert "Traceback" not in done.stderr
