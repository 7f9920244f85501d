"""How much memory a replica of a strategy has."""

import contextlib
import pathlib

import tensorflow as tf
from tensorflow.python.client import device_lib

from tpu.chips import parse_slice

# A core of the smallest TPU, v2, where nobody tells which one it is.
TPU_CORE_BYTES = 8 * 2**30
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def replica_memory(strategy: tf.distribute.Strategy, accelerator_type: str = "") -> int:
    """Returns the bytes that a replica may use; the same at each start on the same machine.

    On a CPU the replicas share what the machine or the container has. A GPU has what TensorFlow
    reserves of it. A TPU has what the table of chips says, that of version 2 where it is not known.

    Args:
      strategy: its replicas.
      accelerator_type: of a TPU, such as "v3-32".
    """
    devices = strategy.extended.worker_devices
    kind = devices[0].split(":")[-2].upper()
    if kind == "TPU":
        with contextlib.suppress(ValueError):
            return parse_slice(accelerator_type).hbm_bytes
        return TPU_CORE_BYTES
    if kind == "GPU":
        limits = [d.memory_limit for d in device_lib.list_local_devices() if d.device_type == kind]
        return min(limits)
    return host_memory() // len(devices)


def host_memory() -> int:
    """Returns the bytes of memory of this machine, or of its container where that has less."""
    total = 1024 * int(pathlib.Path("/proc/meminfo").read_text().split(maxsplit=2)[1])
    for path in map(pathlib.Path, _CGROUP_LIMITS):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total
