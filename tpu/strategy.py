"""Makes the `tf.distribute` strategy that `--tpu` or TF_CONFIG asks for, or says in time why not."""

import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator

import tensorflow as tf

from tpu.cluster import DeviceError, read_cluster, workers_strategy

CONNECT_SECONDS = 40.0
INITIALIZE_SECONDS = 900.0  # a large slice that answers may take minutes to come up
PORT_SECONDS = 10.0
NO_ANSWER_EXIT_CODE = 2


def create_strategy(
    tpu: str = "", zone: str = "", project: str = "", virtual_devices: int = 0
) -> tf.distribute.Strategy:
    """Returns a strategy for the device that was asked for.

    Call it before TensorFlow has touched any device. Where the environment variable TF_CONFIG names
    a cluster of several workers, it waits for all of them.

    Args:
      tpu: "" for all GPUs of this machine or else its CPU; "local" for the TPU of this TPU VM; the
        name of a Cloud TPU; or "grpc://host:8470".
      zone: zone of a TPU given by name; "" for the zone of this machine.
      project: Google Cloud project of a TPU given by name; "" for that of this machine.
      virtual_devices: replicas on the CPU, for trying out a distributed run; 0 for none.

    Raises:
      DeviceError: there is no such device or it does not answer.
    """
    cluster = read_cluster()
    if cluster and (tpu or virtual_devices):
        given = f"--tpu={tpu}" if tpu else f"--virtual_devices={virtual_devices}"
        raise DeviceError(
            f"{given}: expected no TF_CONFIG beside it, which spreads a run over the CPUs or GPUs of "
            f"several machines. Received: TF_CONFIG of {len(cluster.addresses)} workers"
        )
    if virtual_devices and tpu:
        raise DeviceError(
            f"--virtual_devices={virtual_devices}: virtual replicas run on the CPU; expected no --tpu "
            f"beside it. Received: --tpu={tpu}"
        )
    if tpu:
        return _tpu_strategy(tpu, zone, project)
    if virtual_devices:
        return _virtual_strategy(virtual_devices)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if cluster:
        return workers_strategy(cluster)
    if len(gpus) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0")


def describe(strategy: tf.distribute.Strategy) -> str:
    """Returns a line such as "2 replicas on CPU" for the user."""
    kind = strategy.extended.worker_devices[0].split(":")[-2]
    count = strategy.num_replicas_in_sync
    line = f"{count} replica{'s' if count > 1 else ''} on {kind}"
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        line += f" in {count // len(strategy.extended.worker_devices)} workers"
    return line


def _virtual_strategy(count: int) -> tf.distribute.Strategy:
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * count
    try:
        tf.config.set_logical_device_configuration(cpu, logical)
    except RuntimeError:  # devices exist already, as in a test session: use what is there
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise DeviceError(
                f"--virtual_devices={count}: TensorFlow's devices exist already. Expected the strategy "
                "to be made before any other use of TensorFlow"
            ) from None
    # They share one memory; and TensorFlow's collectives, once aborted, stay so for the process.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(count)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def _tpu_strategy(tpu: str, zone: str, project: str) -> tf.distribute.Strategy:
    remedy = _REMEDIES["grpc" if "://" in tpu else "local" if tpu == "local" else "name"]
    if "://" in tpu:
        _check_address(tpu, remedy)
    try:
        with _deadline(CONNECT_SECONDS, f"--tpu={tpu}: no answer", remedy):
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
                tpu=tpu, zone=zone or None, project=project or None
            )
            tf.config.experimental_connect_to_cluster(resolver)
        with _deadline(INITIALIZE_SECONDS, f"--tpu={tpu}: it answers, but does not start", remedy):
            tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (
        Exception
    ) as error:  # TensorFlow, Google's client and its transports raise what they like
        cause = " ".join(str(error).split())[:200]
        raise DeviceError(
            f"--tpu={tpu}: no TPU found ({type(error).__name__}: {cause}). {remedy}"
        ) from None


_REMEDIES = {
    "local": (
        "Tried: the TPU of this machine, through libtpu. Check: that this is a TPU VM, that "
        "`tensorflow-tpu` and `libtpu` are installed, that no other process holds the TPU"
    ),
    "grpc": (
        "Tried: a TensorFlow server at this address. Check: that the TPU is READY, its address and "
        "port (8470 as a rule), that this machine is in its network, that both run the same TensorFlow"
    ),
    "name": (
        "Tried: Google's Cloud TPU API, for the address of the TPU of this name. Check: "
        "`gcloud compute tpus tpu-vm list --zone=...` for its name and state, --tpu_zone, --gcp_project, "
        "credentials (`gcloud auth application-default login`), and that cloud-tpu-client is installed"
    ),
}


def _check_address(address: str, remedy: str) -> None:
    """A gRPC channel to a dead address waits forever, so knock first."""
    for single in address.split(","):
        match = re.fullmatch(r"grpc://([^/:]+|\[[^\]]+\]):(\d+)", single)
        if not match or not 0 < int(match[2]) < 65536:
            raise DeviceError(
                f"--tpu={address}: expected grpc://host:port, for instance grpc://10.0.0.2:8470. "
                f"Received: {single}"
            )
        try:
            host, port = match[1].strip("[]"), int(match[2])
            socket.create_connection((host, port), timeout=PORT_SECONDS).close()
        except OSError as error:
            raise DeviceError(f"--tpu={address}: nothing answers ({error}). {remedy}") from None


@contextlib.contextmanager
def _deadline(seconds: float, failure: str, remedy: str) -> Iterator[None]:
    """Ends the process with a message when the block takes longer than `seconds`.

    A blocked call inside TensorFlow cannot be interrupted from Python, so nothing gentler works.
    """

    def give_up() -> None:
        sys.stderr.write(f"error: {failure} within {seconds:.0f} s. {remedy}\n")
        sys.stderr.flush()
        os._exit(NO_ANSWER_EXIT_CODE)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
