"""The processes that train together where TF_CONFIG names several: agreement, and their loss.

TensorFlow notices a worker that ended at the next collective, at once, and one that is silent after
`tpu.cluster.HEARTBEAT_SECONDS`; the others' collectives then fail, those that wait included.
"""

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from pretraining.errors import InputError
from tpu.cluster import JOBS, Cluster

# What TensorFlow says where a collective, or the service that counts the workers, gave up.
COLLECTIVE = re.compile("ollective ops is aborted|CoordinationService|remote target /job:")
LINGER_SECONDS = 2.0


class WorkerLost(InputError):
    """Another worker ended or cannot be reached; all of them have to be started again."""


def count(strategy: tf.distribute.Strategy) -> int:
    """Returns how many processes train together."""
    cluster = _cluster(strategy)
    return len(cluster.addresses) if cluster else 1


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process is the one that writes the files of the run."""
    cluster = _cluster(strategy)
    return cluster is None or cluster.index == 0


def any_worker(strategy: tf.distribute.Strategy, flag: bool) -> bool:
    """Returns whether a flag is set in any worker. All workers have to ask at the same point."""
    if count(strategy) == 1:
        return flag
    return bool(_sum(strategy)(tf.constant([int(flag)], tf.int64))[0] > 0)


def agree(strategy: tf.distribute.Strategy, value: Any, what: str) -> None:
    """Checks that a value is the same in all workers. All of them have to ask at the same point.

    Args:
      strategy: of the run.
      value: anything that JSON can hold; of objects the message names the keys that differ.
      what: the value in words.

    Raises:
      InputError: the workers differ, in all of them alike.
    """
    if count(strategy) == 1:
        return
    values = [json.loads(text) for text in _gather(strategy, json.dumps(value))]
    if all(isinstance(value, dict) for value in values):
        keys = {key for value in values for key in value}
        differing = {k for k in keys if any(v.get(k) != values[0].get(k) for v in values)}
        values = [{k: v for k, v in value.items() if k in differing} for value in values]
    if any(value != values[0] for value in values):
        received = ", ".join(f"{json.dumps(v)} in worker {i}" for i, v in enumerate(values))
        raise InputError(
            f"TF_CONFIG: expected all workers to agree on {what}. Received: {received}"
        )


@contextlib.contextmanager
def together(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Within it the workers train: they leave together, and the loss of one is told in one line.

    Raises:
      WorkerLost: another worker ended or cannot be reached.
    """
    if count(strategy) == 1:
        yield
        return
    try:
        yield
        any_worker(strategy, False)  # a worker that has left cannot end what the others wait for
        with contextlib.suppress(tf.errors.OpError):
            # Whoever gets here has nothing left to lose, whatever the others do.
            any_worker(strategy, False)
    except Exception as error:
        lost = lost_worker(strategy, error)
        time.sleep(LINGER_SECONDS)  # as above, for those who are a moment behind
        if lost is None:
            raise
        raise lost from None


def lost_worker(strategy: tf.distribute.Strategy, error: Exception) -> WorkerLost | None:
    """Returns what to raise instead of an error that came from the loss of another worker.

    Args:
      strategy: of the run.
      error: anything that was raised. An error of another worker, in its input say, may arrive here
        under the same type: ask this first.
    """
    cluster = _cluster(strategy)
    if not cluster or not isinstance(error, tf.errors.OpError):
        return None
    if not COLLECTIVE.search(str(error.message)):
        return None
    lost = cluster.silent_peers() or _named(str(error.message), strategy, cluster)
    return WorkerLost(
        f"a worker was lost: {', '.join(lost) or _first_line(error)}. What it printed may tell why; "
        "what was saved is intact. Start all workers again to go on"
    )


def _named(message: str, strategy: tf.distribute.Strategy, cluster: Cluster) -> list[str]:
    """The other workers that an error of TensorFlow names."""
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    named = re.findall(r"/job:(\w+)(?:/replica:0)?/task:(\d+)(?!\d|/device)", message)
    addresses = dict.fromkeys(jobs[job][int(task)] for job, task in named)
    indices = [cluster.addresses.index(address) for address in addresses]
    return [f"worker {i} at {cluster.addresses[i]}" for i in indices if i != cluster.index]


def _first_line(error: tf.errors.OpError) -> str:
    return " ".join(str(error.message).split())[:200]


def _cluster(strategy: tf.distribute.Strategy) -> Cluster | None:
    """The workers of a strategy; None where there is one process only."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict()
    addresses = tuple(address for job in JOBS for address in jobs.get(job, ()))
    if len(addresses) < 2:
        return None
    return Cluster(addresses, addresses.index(jobs[resolver.task_type][resolver.task_id]))


@functools.cache
def _sum(strategy: tf.distribute.Strategy) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function that sums a vector over the workers, a fifth of the time of an eager sum."""
    return tf.function(
        lambda values: strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)
    )


def _gather(strategy: tf.distribute.Strategy, text: str) -> list[str]:
    """Returns the texts of all workers."""
    cluster, content = _cluster(strategy), text.encode()
    row = tf.one_hot(cluster.index, len(cluster.addresses), dtype=tf.int64)
    lengths = _sum(strategy)(row * len(content)).numpy()
    padded = tf.constant(list(content.ljust(max(lengths))), tf.int64)
    rows = _sum(strategy)(tf.reshape(row[:, None] * padded, [-1])).numpy().reshape(len(row), -1)
    return [bytes(codes[:n].tolist()).decode() for codes, n in zip(rows, lengths, strict=True)]
