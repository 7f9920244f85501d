"""Looks at all that a run needs before it is started: `python -m tpu.doctor [--tpu=...] [--bucket=gs://...]`.

Prints a line for each thing: ok, or WRONG with what mends it, or skipped where it was not asked for.
The exit status is 0 where nothing is wrong, else 1.
"""

import contextlib
import functools
import os
import pathlib
import platform
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable

from tpu import installation, local_tpu, named_tpu, tpu_servers
from tpu.command_line import Parser
from tpu.failures import SHOWN_CHARACTERS, Fault
from tpu.trials import trial

LOOK_SECONDS = 45.0  # for a line that needs no process of its own
START_SECONDS = 120.0  # a laptop at work elsewhere reads the libraries slowly
BUCKET_SECONDS = 60.0
DEVICE_SECONDS = 300.0  # a large slice that answers may take minutes to come up
GIB = 2**30
# The host of a run keeps records in memory, and the weights and moments while they are saved: 4 GB of
# BERT-Large. Without a TPU the smallest models train in less.
MEMORY_BYTES, TPU_MEMORY_BYTES = 2 * GIB, 16 * GIB
DISK_BYTES = GIB
CGROUP_LIMIT = "/sys/fs/cgroup/memory.max"

Check = Callable[[], str]


class Skipped(Exception):
    """A line that was not asked for, or that another one has settled."""


class Doctor:
    """The lines, in the order in which they are printed.

    Attributes:
      wrong: how many things were found wrong.
    """

    def __init__(self, tpu: str = "", zone: str = "", project: str = "", bucket: str = ""):
        """Looks at nothing yet; the arguments are those of the flags."""
        self.tpu, self.zone, self.project, self.bucket = tpu, zone, project, bucket
        self.wrong = 0
        self._unusable = ""  # the line that says why the TPU cannot be used

    @functools.cached_property
    def installed(self) -> dict[str, installation.Distribution]:
        """What is installed here."""
        return installation.read_installation()

    @functools.cached_property
    def machine(self) -> local_tpu.Machine:
        """What this machine has of a TPU."""
        return local_tpu.read_machine()

    @property
    def on_tpu(self) -> bool:
        """Whether TensorFlow shall drive chips of this machine."""
        return self.tpu == "local" or self.machine.chips > 0

    def examine(self) -> int:
        """Prints a line for each check; returns how many are wrong."""
        for name, check, seconds in (
            ("Python", python, LOOK_SECONDS),
            ("TensorFlow", self.tensorflow, LOOK_SECONDS),
            ("versions", self.versions, LOOK_SECONDS),
            ("extra pretraining", lambda: self.extra("pretraining"), LOOK_SECONDS),
            ("extra tpu", lambda: self.extra("tpu"), LOOK_SECONDS),
            ("extra preflight", lambda: self.extra("preflight"), LOOK_SECONDS),
            ("start", lambda: trial(START_SECONDS, "start"), START_SECONDS),
            ("memory", self.memory, LOOK_SECONDS),
            ("disk", disk, LOOK_SECONDS),
            ("TPU", self.find_tpu, LOOK_SECONDS),
            ("TPU computes", self.try_tpu, DEVICE_SECONDS),
            ("bucket", self.try_bucket, BUCKET_SECONDS),
        ):
            self._line(name, check, seconds)
        return self.wrong

    def tensorflow(self) -> str:
        """Whether one build of TensorFlow is installed, and the right one."""
        if fault := installation.tensorflow_fault(self.installed, self.on_tpu):
            raise fault
        return str(next(d for d in self.installed.values() if d.claims_tensorflow))

    def versions(self) -> str:
        """Whether the versions of what is installed fit each other."""
        faults = installation.version_faults(self.installed)
        if faults:
            raise Fault("; ".join(f.what for f in faults), "; ".join(f.remedy for f in faults))
        found = [self.installed[name] for name in installation.CHECKED if name in self.installed]
        return f"{', '.join(str(d) for d in found)} fit each other"

    def extra(self, name: str) -> str:
        """Whether an extra is there, which not every run needs."""
        command = installation.INSTALL_EXTRA.format(name)
        if installation.OURS not in self.installed:
            raise Skipped(f"{installation.OURS} itself is not installed; {command}")
        missing = installation.missing_of_extra(self.installed, name)
        if not missing:
            return "installed"
        is_name = self.tpu not in ("", "local") and "://" not in self.tpu
        if name == "tpu" and is_name:
            raise Fault(f"--tpu={self.tpu} needs {', '.join(missing)}", f"Remedy: {command}")
        raise Skipped(f"without {', '.join(missing)}; where it is wanted, {command}")

    def memory(self) -> str:
        """Whether this machine has memory enough."""
        needed = TPU_MEMORY_BYTES if self.tpu else MEMORY_BYTES
        return _enough(
            "memory", memory_bytes(), needed, "a larger machine, or a container with more of it"
        )

    def find_tpu(self) -> str:
        """Whether there is the TPU that was asked for, by what can be told without TensorFlow."""
        if not self.tpu:
            raise Skipped("--tpu was not given")
        self._unusable = "see the line above"  # until the end of this
        if self.tpu == "local":
            _raise(local_tpu.fault(self.machine, self.installed))
            found = str(self.machine)
        elif "://" in self.tpu:
            _raise(tpu_servers.address_fault(self.tpu, self._version()))
            found = f"servers answer at {self.tpu}"
        else:
            node = named_tpu.find(self.tpu, self.zone, self.project)
            _raise(named_tpu.node_fault(node, self._version()))
            _raise(tpu_servers.silent_fault(node.addresses, node.runtime_version))
            found = (
                f"{node}, {node.health or 'health unknown'}, {len(node.addresses)} workers answer"
            )
        if self.tpu != "local":
            _raise(tpu_servers.library_fault(self.machine, self.installed))
        self._unusable = ""
        return found

    def try_tpu(self) -> str:
        """Whether the TPU computes; it must be free."""
        if not self.tpu or self._unusable:
            raise Skipped(self._unusable or "--tpu was not given")
        return trial(DEVICE_SECONDS, "device", self.tpu, self.zone, self.project)

    def try_bucket(self) -> str:
        """Whether the bucket can be used."""
        if not self.bucket:
            raise Skipped("--bucket was not given")
        return trial(BUCKET_SECONDS, "bucket", self.bucket)

    def _version(self) -> str:
        return installation.tensorflow_version(self.installed)

    def _line(self, name: str, check: Check, seconds: float) -> None:
        """Prints one line, whatever the check does."""
        try:
            line = f"ok       {name}: {bounded(check, seconds + 5.0)}"
        except Skipped as reason:
            line = f"skipped  {name}: {reason}"
        except Exception as error:
            self.wrong += 1
            if isinstance(error, Fault):
                remedy = error.remedy.removeprefix("Remedy: ")
                line = f"WRONG    {name}: {error.what} : {remedy}"
            else:  # no line may hide the next one
                text = " ".join(str(error).split())[:SHOWN_CHARACTERS]
                line = f"WRONG    {name}: {type(error).__name__}: {text}"
        print(line, flush=True)


def python() -> str:
    """Which Python this is."""
    return f"{platform.python_version()} at {sys.executable}"


def disk() -> str:
    """Whether there is room for what runs write on this machine."""
    places = {os.getcwd(), tempfile.gettempdir()}
    place = min(places, key=lambda folder: shutil.disk_usage(folder).free)
    free = shutil.disk_usage(place).free
    return _enough(
        f"room in {place}", free, DISK_BYTES, "delete something, or --output_dir=gs://..."
    )


def memory_bytes() -> int:
    """Returns the bytes of memory of this machine, or of its container where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        return min(total, int(pathlib.Path(CGROUP_LIMIT).read_text()))
    return total


def bounded(check: Check, seconds: float) -> str:
    """Returns what a check returns; gives it up where that takes too long.

    Raises:
      Fault: there was no answer.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((check(), None))
        except BaseException as error:
            results.put(("", error))

    threading.Thread(target=work, daemon=True).start()
    try:
        found, error = results.get(timeout=seconds)
    except queue.Empty:
        raise Fault(f"no answer within {seconds:.0f} s", "try again") from None
    if error is not None:
        raise error
    return found


def _enough(name: str, free: int, needed: int, remedy: str) -> str:
    if free < needed:
        raise Fault(
            f"expected {needed / GIB:.0f} GiB of {name}. Received: {free / GIB:.1f} GiB", remedy
        )
    return f"{free / GIB:.1f} GiB" + name.removeprefix("memory").removeprefix("room")


def _raise(fault: Fault | None) -> None:
    if fault:
        raise fault


def parse(argv: list[str]) -> Doctor:
    """Returns what the flags ask for."""
    parser = Parser(prog="python -m tpu.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", default="", help="local, the name of a TPU, or grpc://host:8470")
    parser.add_argument("--tpu_zone", default="", help="zone of a TPU given by name")
    parser.add_argument("--gcp_project", default="", help="project of a TPU given by name")
    parser.add_argument("--bucket", default="", help="gs:// path that a run shall write to")
    flags = parser.parse_args(argv)
    if flags.bucket and not flags.bucket.removeprefix("gs://").strip("/"):
        parser.error("--bucket: expected gs://bucket. Received: no name")
    if flags.bucket and not flags.bucket.startswith("gs://"):
        parser.error(f"--bucket: expected a path that begins with gs://. Received: {flags.bucket}")
    return Doctor(flags.tpu, flags.tpu_zone, flags.gcp_project, flags.bucket)


def main(argv: list[str]) -> int:
    """Examines what the flags ask for; returns the exit status."""
    wrong = parse(argv).examine()
    print(f"{wrong} of the above need mending" if wrong else "Nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
