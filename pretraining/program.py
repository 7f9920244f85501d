"""What the programs of this package have in common: flags in, exit status out, no traceback."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pretraining import flags
from pretraining.errors import DeviceLost, InputError

USAGE_ERROR = 2
INTERRUPTED = 130
DEVICE_LOST = 69  # EX_UNAVAILABLE: look at the TPU, then start again


def run(argv: Sequence[str], name: str, settings: type, work: Callable[[Any], int | None]) -> int:
    """Runs a program; returns its exit status, 2 where something given cannot work.

    Args:
      argv: the program's name and its arguments.
      name: what stands behind `python -m`.
      settings: the dataclass of its flags.
      work: does what the settings ask for. It imports TensorFlow (7 s), nothing before it does.
    """
    try:
        config = flags.parse(argv, name, settings)
        # TensorFlow's own messages; set TF_CPP_MIN_LOG_LEVEL=0 to see them.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        # tf-models imports matplotlib, which complains of a home that it cannot write to.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        return work(config) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except DeviceLost as error:
        print(f"error: {error}", file=sys.stderr)
        return DEVICE_LOST
    except KeyboardInterrupt:
        print("stopped. Repeat the command to go on.", file=sys.stderr)
        return INTERRUPTED


def leave(status: int) -> None:
    """Ends the process.

    Everything is written by now. TensorFlow's own tear-down of an endless input of several
    replicas can wait for minutes on a thread that has gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
