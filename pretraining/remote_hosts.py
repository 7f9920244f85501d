"""What a run needs where the TPU hangs on other machines, which read and write its files."""

import re

import tensorflow as tf

from pretraining.config import Config
from pretraining.errors import DeviceLost, InputError
from pretraining.files import on_gcs

# What TensorFlow raises where the other end is gone, and what it says: storage raises them as well.
GONE = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.UnavailableError,
)
CONNECTION = re.compile("remote target /job:|[Ff]ailed to connect|Socket closed|Connection reset")
PATHS = ("input_files", "eval_files", "init_checkpoint", "eval_checkpoint", "output_dir")


def is_remote(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process drives TPUs of other machines."""
    return (
        isinstance(strategy, tf.distribute.TPUStrategy)
        and "/job:localhost/" not in strategy.extended.worker_devices[0]
    )


def check_paths(config: Config, strategy: tf.distribute.Strategy) -> None:
    """Looks at the flags that name files.

    Raises:
      InputError: the TPU's hosts cannot reach one of them.
    """
    if not is_remote(strategy):
        return
    for name in PATHS:
        value = getattr(config, name)
        if value and not all(on_gcs(path.strip()) for path in value.split(",")):
            raise InputError(
                f"--{name}={value}: expected gs://..., as it is the hosts of --tpu={config.tpu} that read "
                "and write, not this machine. Remedy: `gcloud storage cp -r` to a bucket near the TPU"
            )


def lost_tpu(strategy: tf.distribute.Strategy, error: BaseException) -> DeviceLost | None:
    """Returns what to raise instead of an error that came from the loss of the TPU, or nothing.

    Args:
      strategy: of the run.
      error: anything that was raised; where a save failed, say, the loss stands behind another error.
    """
    if not is_remote(strategy):
        return None
    behind: BaseException | None = error
    while behind is not None:
        message = str(getattr(behind, "message", ""))
        if isinstance(behind, GONE) and CONNECTION.search(message):
            return DeviceLost(
                f"the TPU was lost ({' '.join(message.split())[:200]}). Check: that it is READY and was "
                "not preempted; what was saved is intact. Start again to go on"
            )
        behind = behind.__context__
    return None
