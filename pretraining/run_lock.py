"""One run at a time in an output folder.

On a disk the kernel keeps the lock, which dies with its process. Cloud Storage has none: there the
run writes an object again and again, a heartbeat, and one that has stood still for a minute by the
clock of whoever watches it is that of a dead run. Two that start at once are told apart by reading
back; and before each beat a run looks whether the object is still its own.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, TextIO

import tensorflow as tf

from pretraining import console, files
from pretraining.errors import InputError
from pretraining.run_directory import writing

BEAT_SECONDS = 15.0
EXPIRY_SECONDS = 60.0  # without a beat
LOOK_SECONDS = 3.0  # between two looks at the heart of another run
SETTLE_SECONDS = 1.0  # in which another run that starts at the same moment has written as well
# TensorFlow may take the size of an object for what it was some seconds ago, so it never changes.
RECORD_BYTES = 512


class RunLock:
    """A folder that is this run's alone."""

    def check(self) -> None:
        """Makes sure that it still is.

        Raises:
          InputError: another run has taken over.
        """


@contextlib.contextmanager
def run_lock(path: str) -> Iterator[RunLock]:
    """Keeps a second run out of a folder.

    Args:
      path: the folder, local or gs://; it is there.

    Raises:
      InputError: another run is at work there.
    """
    if not files.on_gcs(path):
        with _flock(path) as lock:
            yield lock
        return
    lock = _Heartbeat(path)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def _flock(path: str) -> Iterator[RunLock]:
    with writing(path):
        file = open(f"{path}/.lock", "a+")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _occupied(path, f"process {file.read() or '?'} is at work") from None
        except OSError as error:
            console.say(
                f"Warning: the file system of {path} knows no locks ({error.strerror}), so nothing "
                "keeps a second run out of it"
            )
        with writing(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield _FileLock(path, file)


def _occupied(path: str, by: str) -> InputError:
    return InputError(
        f"--output_dir={path}: expected a folder for this run alone. Received: one in which {by}"
    )


class _FileLock(RunLock):
    """The lock of a run on a disk, which holds as long as its file stands in the folder."""

    def __init__(self, path: str, file: TextIO):
        self._path = path
        self._file = file

    def check(self) -> None:
        """See `RunLock`; a folder that was removed, or put back, is locked no more."""
        try:
            there = os.stat(f"{self._path}/.lock")
        except FileNotFoundError:
            there = None
        except OSError:  # storage out of reach: a matter of those who write
            return
        if there and os.path.samestat(there, os.fstat(self._file.fileno())):
            return
        raise InputError(
            f"--output_dir={self._path}: expected the folder that this run has locked. Received: "
            "one without its .lock, which was removed or replaced while the run was at work"
        )


class _Heartbeat(RunLock):
    """The lock of a run on gs://, an object that it writes again and again."""

    def __init__(self, path: str):
        self._path = path
        self._object = f"{path}/.lock"
        self._record = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
        }
        self._beats = 0
        self._last_beat = 0.0
        self._taken_by: dict[str, Any] | None = None
        self._stopped = threading.Event()
        self._busy = threading.Lock()  # one beat at a time, and none after the end
        self._thread = threading.Thread(target=self._beat_on, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Waits until no other run can be alive here, and takes the folder."""
        try:
            self._wait_for_another()
        except tf.errors.OpError as error:
            raise InputError(
                f"--output_dir={self._path}: {files.why(error, self._object, 'read')}"
            ) from None
        with writing(self._object):
            self._write()
            time.sleep(SETTLE_SECONDS)
            found = self._read()
        if found and found.get("token") != self._record["token"]:
            raise _occupied(self._path, f"{_name(found)} has started at the same moment")
        self._thread.start()

    def check(self) -> None:
        """See `RunLock`; asks Cloud Storage where no beat has got through for long."""
        if time.monotonic() - self._last_beat > EXPIRY_SECONDS - BEAT_SECONDS:
            try:
                self._beat()
            except tf.errors.OpError as error:
                why = files.why(error, self._object, "written")
                raise InputError(
                    f"--output_dir={self._path}: another run may have taken over: {why}"
                ) from None
        if self._taken_by:
            raise _occupied(self._path, f"{_name(self._taken_by)} has taken over")

    def release(self) -> None:
        """Removes the object if it is still this run's."""
        self._stopped.set()
        # In the middle of requests that get no answer there is nothing to do; it expires.
        if self._busy.acquire(timeout=BEAT_SECONDS):
            with contextlib.suppress(tf.errors.OpError):
                if (self._read() or {}).get("token") == self._record["token"]:
                    tf.io.gfile.remove(self._object)
            self._busy.release()

    def _wait_for_another(self) -> None:
        first = self._read()
        if first is None or _is_dead(first):
            return
        console.say(
            f"{self._path}: {_name(first)} was at work here last. Waiting for up to "
            f"{EXPIRY_SECONDS:.0f} s, in which it gives a sign of life if it still is"
        )
        since = time.monotonic()
        while time.monotonic() - since < EXPIRY_SECONDS:
            time.sleep(LOOK_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != first:
                raise _occupied(self._path, f"{_name(now)} is at work")

    def _beat_on(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS) and not self._taken_by:
            # The network may be down; how long it was is for `check` to judge.
            with contextlib.suppress(tf.errors.OpError):
                self._beat()

    def _beat(self) -> None:
        """Writes the object again, unless it is another run's by now."""
        with self._busy:
            if self._stopped.is_set() or self._taken_by:
                return
            found = self._read()
            if found and found.get("token") != self._record["token"]:
                self._taken_by = found
            else:
                self._write()

    def _write(self) -> None:
        started = time.monotonic()
        self._beats += 1
        text = json.dumps({**self._record, "beats": self._beats})
        files.write(self._object, text.ljust(RECORD_BYTES))
        self._last_beat = started

    def _read(self) -> dict[str, Any] | None:
        """Returns what the object says, None where there is none."""
        try:
            with tf.io.gfile.GFile(self._object, "rb") as file:
                content = file.read()
        except tf.errors.NotFoundError:
            return None
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {"content": content}


def _name(record: dict[str, Any]) -> str:
    return f"process {record.get('pid', '?')} on {record.get('host', '?')}"


def _process(pid: int) -> str | None:
    """Says which process a number means: that since which start of the kernel, in which container.

    Returns:
      Boot, namespace of process numbers, and start of the process; None where none can be told.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # The name of the program, in parentheses, may hold any character.
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot} {namespace} {fields[18]}"


def _is_dead(record: dict[str, Any]) -> bool:
    """Tells whether a record is that of a process of this machine which is no more."""
    theirs, ours, pid = record.get("process"), _process(os.getpid()), record.get("pid")
    if not (isinstance(theirs, str) and ours and isinstance(pid, int)):
        return False
    same_machine = theirs.split()[:2] == ours.split()[:2]
    return same_machine and _process(pid) != theirs
