"""What every benchmark writes beside its figures: the machine, the versions, the command."""

import csv
import datetime
import importlib.metadata
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

import tensorflow as tf

import lamb_tf

RESULTS = pathlib.Path(__file__).parent / "results"


def progress(message: str) -> None:
    """Prints to stderr, so that stdout holds the table alone."""
    print(message, file=sys.stderr, flush=True)


def machine() -> tuple[str, str]:
    """Returns a description of this machine, and a short name for files."""
    cpu = "cpu"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    cores = len(os.sched_getaffinity(0))
    gpus = tf.config.list_physical_devices("GPU")
    gpu = (
        tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else ""
    )
    text = f"{cpu}, {cores} cores" + (f", {gpu}" if gpu else "")
    short = "".join(c if c.isalnum() else "_" for c in (gpu or f"{cpu}_{cores}cores")).lower()
    return text, short


def facts(packages: Sequence[str]) -> dict[str, str]:
    """Returns versions, machine, command and date, the last columns of each row."""
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "lamb_tf": lamb_tf.__version__,
        "machine": machine()[0],
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
    }


def default_path(benchmark: str) -> pathlib.Path:
    """Returns the file of a benchmark's results on this machine."""
    return RESULTS / f"{benchmark}-{machine()[1]}-tf{tf.__version__}.csv"


def write_csv(path: pathlib.Path, rows: list[dict], columns: Sequence[str]) -> None:
    """Writes the rows with what is needed to repeat them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    progress(f"Written: {path}")
