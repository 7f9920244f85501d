"""The processes that train together where TF_CONFIG names several, and the strategy that joins them."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import select
import signal
import socket
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

KNOCK_SECONDS = 2.0
WORKERS_SECONDS = 600.0  # the machines of a cluster do not boot all at once
WORKERS_NOTICE_SECONDS = 10.0
# Without a sign of life for so long a worker is lost. TensorFlow's own 10 s are less than a virtual
# machine may stand still when its host is maintained.
HEARTBEAT_SECONDS = 30.0
JOBS = ("chief", "worker")

REMEDY = (
    "Tried: a TensorFlow server of each worker at its address. Check: that all of them were started, "
    "anew if one of them ended, with the same cluster in TF_CONFIG and an index of their own, that "
    "the ports are open between the machines, that all run the same TensorFlow"
)


class DeviceError(RuntimeError):
    """The device that was asked for cannot be used; the text says what was tried and what to check."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that train together, as TF_CONFIG names them.

    Attributes:
      addresses: host:port of each, the chief first.
      index: which of them this process is.
    """

    addresses: tuple[str, ...]
    index: int

    def silent_peers(self) -> list[str]:
        """Knocks at the other workers; returns a text for each that does not answer."""
        peers = [i for i in range(len(self.addresses)) if i != self.index]
        with concurrent.futures.ThreadPoolExecutor(64) as threads:
            errors = threads.map(_knock, [self.addresses[i] for i in peers])
        return [
            f"worker {i} at {self.addresses[i]} ({error})"
            for i, error in zip(peers, errors, strict=True)
            if error
        ]


def read_cluster() -> Cluster | None:
    """Returns the cluster of the environment variable TF_CONFIG; None where it has no two workers.

    Raises:
      DeviceError: TF_CONFIG is there and makes no sense.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _bad_config(f"a JSON object ({error})", text) from None
    cluster = config.get("cluster") if isinstance(config, dict) else text
    if not cluster:
        return None
    if not isinstance(cluster, dict) or not all(isinstance(v, list) for v in cluster.values()):
        raise _bad_config("lists of addresses by job under cluster", cluster)
    if set(cluster) - set(JOBS) or len(cluster.get("chief", ())) > 1:
        raise _bad_config("workers and at most one chief in the cluster", list(cluster))
    addresses = [address for job in JOBS for address in cluster.get(job, ())]
    for address in addresses:
        if not isinstance(address, str) or not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
            raise _bad_config("host:port as each address", address)
    if len(set(addresses)) < len(addresses):
        raise _bad_config("another address for each worker", addresses)
    index = _index(cluster, config.get("task"))
    return Cluster(tuple(addresses), index) if len(addresses) > 1 else None


def _index(cluster: dict[str, list], task: Any) -> int:
    task = task if isinstance(task, dict) else {}
    job, number = task.get("type"), str(task.get("index"))
    # Not isdigit: that takes a superscript for a number.
    if job not in cluster or not number.isdecimal() or int(number) >= len(cluster[job]):
        sizes = " or ".join(f"{job} 0 to {len(cluster[job]) - 1}" for job in cluster)
        raise _bad_config(f"type and index of this process under task: {sizes}", task)
    return int(number) + (len(cluster.get("chief", ())) if job == "worker" else 0)


def _bad_config(expected: str, received: Any) -> DeviceError:
    received = received if isinstance(received, str) else json.dumps(received)
    return DeviceError(
        f"TF_CONFIG: expected {expected}. Received: {' '.join(received.split())[:200]}"
    )


def workers_strategy(cluster: Cluster) -> tf.distribute.Strategy:
    """Waits for all workers of a cluster and returns their strategy."""
    address = cluster.addresses[cluster.index]
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise DeviceError(
            f"TF_CONFIG: expected a free port for this worker, {cluster.index} at {address}. "
            f"Received: {error}. Check: that no earlier start of it is still at work"
        ) from None
    _set_heartbeat(cluster)

    try:
        with _waiting_for(cluster):
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except Exception as error:  # TensorFlow's service raises any of its errors
        cause = " ".join(str(error).split())[:200]
        raise DeviceError(
            f"TF_CONFIG: the workers cannot start ({type(error).__name__}: {cause}). {REMEDY}"
        ) from None
    # All workers have equally many batches: else each step would ask all whether there is one.
    strategy.extended.experimental_enable_get_next_as_optional = False
    return strategy


def _set_heartbeat(cluster: Cluster) -> None:
    """Has TensorFlow wait longer for a worker that is silent; no public interface does."""
    from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
    from tensorflow.python.eager import context

    jobs = json.loads(os.environ["TF_CONFIG"])["cluster"]
    context.context().configure_coordination_service(
        "standalone",
        f"/job:{'chief' if jobs.get('chief') else 'worker'}/replica:0/task:0",
        heartbeat_timeout_in_ms=int(HEARTBEAT_SECONDS * 1000),
        coordinated_jobs=[
            coordination_config_pb2.CoordinatedJob(name=job, num_tasks=len(addresses))
            for job, addresses in jobs.items()
        ],
    )


def _knock(address: str) -> str:
    """Returns why nothing answers at host:port; nothing if something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


@contextlib.contextmanager
def _waiting_for(cluster: Cluster) -> Iterator[None]:
    """Says whom the block waits for, and kills the process when that takes too long.

    From a process of its own: TensorFlow waits for the workers with Python's lock in its hands.
    """
    ended, end = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            os.close(end)  # or the end of the other process would not be seen
            _watch(cluster, ended, os.getppid())
        finally:
            os._exit(0)
    os.close(ended)
    try:
        yield
    finally:
        os.close(end)
        os.waitpid(watcher, 0)


def _watch(cluster: Cluster, ended: int, waiting: int) -> None:
    if select.select([ended], [], [], WORKERS_NOTICE_SECONDS)[0]:
        return
    silent = ", ".join(cluster.silent_peers()) or "workers that answer and do not start"
    os.write(2, f"Waiting up to {WORKERS_SECONDS:.0f} s for {silent}\n".encode())
    if select.select([ended], [], [], WORKERS_SECONDS - WORKERS_NOTICE_SECONDS)[0]:
        return
    silent = ", ".join(cluster.silent_peers()) or "none"
    line = f"TF_CONFIG: no start of all workers within {WORKERS_SECONDS:.0f} s; silent: {silent}"
    os.write(2, f"error: {line}. {REMEDY}\n".encode())
    os.kill(waiting, signal.SIGKILL)
