"""What a supervisor must know after its own death: which slice is its own, and what it has cost."""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator

from tpu.cloud_errors import CloudError


@dataclasses.dataclass
class State:
    """The memory of a supervisor.

    Attributes:
      name: of the slice.
      zone: and `project`, where it is.
      creation: label of the slice that this supervisor asked for last; "" for none.
      set_up: the slice that has been set up, by its label or id.
      recreations: how often it was made anew.
      used_seconds: for which slices existed that exist no more.
      since: time by the clock, in seconds, since which one exists; None for none.
    """

    name: str
    zone: str
    project: str
    creation: str = ""
    set_up: str = ""
    recreations: int = 0
    used_seconds: float = 0.0
    since: float | None = None

    @property
    def seconds(self) -> float:
        """For how long slices have existed. After a death of the supervisor it counts too much,
        not too little: a slice that went meanwhile counts until its loss is seen.
        """
        return self.used_seconds + (max(time.time() - self.since, 0.0) if self.since else 0.0)

    def begin(self, since: float | None = None) -> None:
        """Notes that a slice exists, since a time by the clock or since now."""
        self.since = self.since or since or time.time()

    def end(self) -> None:
        """Notes that it exists no more."""
        self.used_seconds, self.since = self.seconds, None


class StateFile:
    """A state on a disk, of which a reader sees the old one or the new one."""

    def __init__(self, path: str):
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second supervisor away.

        Raises:
          CloudError: there is one, or the file cannot be written.
        """
        with self._written():
            file = open(f"{self.path}.lock", "a")  # noqa: SIM115
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CloudError(
                    f"--state_file={self.path}: expected no other supervisor at work with it. "
                    "Received: one that is. Remedy: stop it, or name another slice and file"
                ) from None
            except OSError:
                pass  # a file system without locks
            yield

    def read(self, name: str, zone: str, project: str) -> State:
        """Returns the state, a new one where there is no file.

        Raises:
          CloudError: the file is damaged, or is that of another slice.
        """
        try:
            with open(self.path) as file:
                state = State(**json.load(file))
        except FileNotFoundError:
            return State(name, zone, project)
        except (OSError, ValueError, TypeError) as error:
            raise CloudError(
                f"--state_file={self.path}: expected the state of a supervisor. Received: "
                f"{type(error).__name__}. Remedy: `python -m tpu.cloud list`, delete what is not "
                "needed, then remove the file"
            ) from None
        theirs, ours = (state.name, state.zone, state.project), (name, zone, project)
        if theirs != ours:
            raise CloudError(
                f"--state_file={self.path}: expected that of {' '.join(ours)}. Received: that of "
                f"{' '.join(map(str, theirs))}. Remedy: another --state_file"
            )
        return state

    def write(self, state: State) -> None:
        """Replaces the file.

        Raises:
          CloudError: it cannot be written.
        """
        part = f"{self.path}.part"
        with self._written():
            with open(part, "w") as file:
                json.dump(dataclasses.asdict(state), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)

    def remove(self) -> None:
        """Forgets the state of a run that is over."""
        with self._written(), contextlib.suppress(FileNotFoundError):
            os.remove(self.path)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CloudError(
                f"--state_file={self.path}: expected a file that can be written. Received: "
                f"{error.strerror}"
            ) from None
