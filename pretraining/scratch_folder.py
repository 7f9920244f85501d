"""The local folder in which make_data keeps what is finished until all is.

It holds the lock that keeps a second run out, the plan of the run, the files of the blocks and the
facts of finished shards. This module needs no TensorFlow: it is used before that is imported.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from pretraining.errors import InputError

NAME = ".unfinished"
PATIENCE = 10.0  # seconds for the workers of a killed run to end


def place(output_dir: str, work_dir: str) -> str:
    """Returns the scratch folder of an output folder, which may be on gs://."""
    if work_dir:
        # Several outputs may share it.
        return os.path.join(work_dir, _hashed(output_dir))
    if "://" in output_dir:
        return os.path.join(tempfile.gettempdir(), _hashed(output_dir))
    return os.path.join(output_dir, NAME)


def _hashed(output_dir: str) -> str:
    return "make_data-" + hashlib.sha256(output_dir.rstrip("/").encode()).hexdigest()[:16]


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists, in words, what differs between the plans of two runs.

    Args:
      then: {"settings", "input", "vocab", and perhaps "versions"} as `make_data` makes them.
      now: likewise.
    """
    found = []
    for part, prefix in (("settings", "--"), ("versions", "")):
        before, after = then.get(part, {}), now.get(part, {})
        for name in {**before, **after} if before and after else ():
            if before.get(name) != after.get(name):
                found.append(f"{prefix}{name} was {before.get(name)}, is {after.get(name)}")
    if then.get("vocab") != now["vocab"]:
        found.append("--vocab_file held other tokens")
    found += _input_differences(then.get("input", []), now["input"])
    return found


def _input_differences(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    before, after = ({file["path"]: file for file in files} for files in (then, now))
    changed = [
        (
            path,
            "is new" if path not in before else "is gone" if path not in after else "has changed",
        )
        for path in {**before, **after}
        if before.get(path) != after.get(path)
    ]
    if not changed:
        return []
    more = f" and {len(changed) - 1} files more" if len(changed) > 1 else ""
    return [f"--input: {changed[0][0]} {changed[0][1]}{more}"]


@dataclasses.dataclass(frozen=True)
class ScratchFolder:
    """The files in a scratch folder.

    Attributes:
      path: the folder.
    """

    path: str

    def block(self, index: int) -> str:
        """The file of a block."""
        return os.path.join(self.path, f"block-{index:06d}")

    def finished_block(self, index: int) -> str:
        """The examples of a block that had to borrow documents."""
        return self.block(index) + "-examples"

    def note(self, shard: str) -> str:
        """What is known of a shard."""
        return os.path.join(self.path, f"{shard}.json")

    def read(self, name: str) -> Any:
        """Returns the content of a JSON file, None where there is none."""
        try:
            with open(os.path.join(self.path, name)) as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def write(self, name: str, values: Any) -> None:
        """Writes a JSON file, which is whole or not there."""
        path = os.path.join(self.path, name)
        with open(f"{path}.unfinished", "w") as file:
            json.dump(values, file)
        os.rename(f"{path}.unfinished", path)

    def clear(self) -> None:
        """Removes all but the lock, in an order that may be broken off anywhere.

        What says that files are there goes before them; the plan, without which nothing else here is
        believed, goes last.
        """
        order = {"blocks.json": 0, "shards.json": 0, "plan.json": 2}
        for name in sorted(os.listdir(self.path), key=lambda name: (order.get(name, 1), name)):
            if name != ".lock":
                os.remove(os.path.join(self.path, name))

    def remove(self) -> None:
        """Removes the folder."""
        self.clear()
        shutil.rmtree(self.path)

    @contextlib.contextmanager
    def locked(self, output_dir: str) -> Iterator[int]:
        """Keeps a second run out; yields the file descriptor that holds the lock.

        A lock dies with the last process that holds it. A folder in which no run was planned is
        removed again.

        Raises:
          InputError: another run is at work, or the folder cannot be made.
        """
        made = not os.path.exists(output_dir)
        try:
            descriptor = self._lock()
        except BlockingIOError as error:
            raise InputError(
                f"--output_dir={output_dir}: expected a folder for this run alone. Received: one in "
                f"which process {error.strerror} is at work"
            ) from None
        except OSError as error:
            raise InputError(
                f"--output_dir={output_dir}: expected a folder that can be written to. Received: "
                f"{error.filename}: {error.strerror}"
            ) from None
        try:
            yield descriptor
        finally:
            if os.path.isdir(self.path) and self.read("plan.json") is None:
                self.remove()
                if made and os.path.isdir(output_dir) and not os.listdir(output_dir):
                    os.rmdir(output_dir)
            os.close(descriptor)

    def _lock(self) -> int:
        path = os.path.join(self.path, ".lock")
        deadline = time.monotonic() + PATIENCE
        while True:
            os.makedirs(self.path, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 20).decode() or "?"
                os.close(descriptor)
                # Its workers hold the lock too, and die a moment after it.
                if _is_alive(holder) or time.monotonic() > deadline:
                    raise BlockingIOError(0, holder) from None
                time.sleep(0.05)
                continue
            # A run that ended in between has removed the file that was locked here.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        return descriptor
