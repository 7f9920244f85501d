"""Makes the `tf.distribute` strategy that `--tpu` or TF_CONFIG asks for, or says in time why not."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import tensorflow as tf

from tpu import installation, local_tpu, named_tpu, tpu_servers
from tpu.cluster import DeviceError, read_cluster, workers_strategy
from tpu.failures import LOCAL_NO_ANSWER, NO_ANSWER, Fault, from_tensorflow

CHECK_SECONDS = 40.0
CONNECT_SECONDS = 30.0  # something listens there by then
INITIALIZE_SECONDS = 900.0  # a large slice that answers may take minutes to come up
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


def accelerator_type(tpu: str, zone: str = "", project: str = "") -> str:
    """Returns the slice behind a flag that has made a strategy, such as "v3-32".

    Args:
      tpu: as for `create_strategy`.
      zone: likewise.
      project: likewise.

    Returns:
      Google's name, or "" where nobody tells: for addresses, and where there is no TPU.
    """
    if tpu == "local":
        return local_tpu.read_machine().accelerator_type
    if not tpu or "://" in tpu:
        return ""
    try:
        return named_tpu.find(tpu, zone, project).accelerator_type
    except Fault:  # it was there a moment ago; the run itself will say what is wrong
        return ""


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
    remedy = LOCAL_NO_ANSWER if tpu == "local" else NO_ANSWER
    try:
        # Each of the checks has its limits; this one is for what nobody has thought of.
        with _deadline(CHECK_SECONDS, f"--tpu={tpu}: no answer", remedy):
            if tpu == "local":
                target = _checked_local()
            elif "://" in tpu:
                target = _checked_address(tpu)
            else:
                target = _checked_name(tpu, zone, project)
        return _connected(target, f"--tpu={tpu}", remedy)
    except Fault as fault:
        raise DeviceError(f"--tpu={tpu}: {fault}") from None


def _checked_local() -> str:
    """Returns what the resolver takes for the TPU of this machine, if it can be used."""
    _raise(local_tpu.fault(local_tpu.read_machine(), installation.read_installation()))
    return "local"


def _checked_address(address: str) -> str:
    """Returns the addresses, if a server answers at each."""
    installed = installation.read_installation()
    _raise(tpu_servers.address_fault(address, tf.__version__))
    _raise(tpu_servers.library_fault(local_tpu.read_machine(), installed))
    return address


def _checked_name(name: str, zone: str, project: str) -> str:
    """Returns the addresses of the workers of a TPU, if each answers."""
    node = named_tpu.find(name, zone, project)
    _raise(named_tpu.node_fault(node, tf.__version__))
    installed = installation.read_installation()
    _raise(tpu_servers.library_fault(local_tpu.read_machine(), installed))
    _raise(tpu_servers.silent_fault(node.addresses, node.runtime_version))
    return node.url


def _raise(fault: Fault | None) -> None:
    if fault:
        raise fault


def _connected(target: str, flag: str, remedy: str) -> tf.distribute.Strategy:
    """Connects to a TPU and starts it.

    Args:
      target: for TensorFlow's resolver; never a name, which it would look up once more, and by another
        version of the API.
      flag: for messages.
      remedy: where nothing is known of what went wrong.

    Raises:
      Fault: the TPU cannot be used.
    """
    try:
        with _deadline(CONNECT_SECONDS, f"{flag}: no answer", remedy):
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=target)
            tf.config.experimental_connect_to_cluster(resolver)
        with _deadline(INITIALIZE_SECONDS, f"{flag}: it answers, but does not start", remedy):
            tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (
        Exception
    ) as error:  # TensorFlow, Google's client and its transports raise what they like
        raise from_tensorflow(error, remedy) from None


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
