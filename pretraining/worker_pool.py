"""Processes that work on tasks: none outlives its parent, and a death is named.

A worker is a fresh interpreter (`python -m pretraining.worker_pool`), connected by one socket. It
imports what it needs while the parent imports TensorFlow. Nothing is queued: a task is made when a
worker is free to take it.
"""

import collections
import contextlib
import ctypes
import importlib
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any

from pretraining.errors import InputError

GO_ON = "What is finished is kept: repeat the command to go on"
_PR_SET_PDEATHSIG = 1


class WorkerPool:
    """A number of worker processes; a context manager that ends them.

    Attributes:
      pids: process id of each worker.
    """

    def __init__(self, count: int, work: str, keep_open: Iterable[int] = ()):
        """Starts the workers.

        Args:
          count: how many.
          work: "module:function" of `function(settings, task) -> result`, called in the workers.
          keep_open: file descriptors that live as long as the last worker, such as a lock.
        """
        self._settings: bytes | None = None
        self._told: set[int] = set()
        self._processes: list[subprocess.Popen] = []
        self._connections: list[connection.Connection] = []
        # A worker has Ctrl-C blocked from its first instruction on: the parent ends it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(count):
                self._start(work, tuple(keep_open))
        except OSError as error:
            self.__exit__()
            raise InputError(
                f"--workers={count}: process {len(self._processes) + 1} cannot be started "
                f"({error.strerror})"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pids = [process.pid for process in self._processes]

    def _start(self, work: str, keep_open: tuple[int, ...]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "pretraining.worker_pool"]
            path = os.pathsep.join(
                [str(pathlib.Path(__file__).parents[1]), *filter(None, sys.path)]
            )
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), work],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *keep_open),
                env={**os.environ, "PYTHONPATH": path},
            )
        self._processes.append(process)
        self._connections.append(connection.Connection(ours.detach()))

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: Any) -> None:
        # Whatever is finished has its name, so a worker can be stopped at any moment.
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._connections, strict=True):
            process.wait()
            pipe.close()

    def run(self, settings: Any, tasks: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Has every task done; each is taken from `tasks` when a worker is free.

        Args:
          settings: handed to each worker once, before its first task.
          tasks: (what it is called in messages, the task).

        Yields:
          (what the task is called, its result), in the order in which they are done.

        Raises:
          InputError: a task failed, or a worker died.
        """
        self._settings, self._told = pickle.dumps((None, settings)), set()
        waiting = iter(tasks)
        idle = collections.deque(range(len(self._processes)))
        busy: dict[int, str] = {}
        while True:
            while idle and (task := next(waiting, None)) is not None:
                worker = idle.popleft()
                busy[worker] = task[0]
                self._send(worker, *task)
            if not busy:
                return
            # The idle ones too: a worker that dies with nothing to do would never be missed.
            pipes = {id(pipe): worker for worker, pipe in enumerate(self._connections)}
            for pipe in connection.wait(self._connections):
                worker = pipes[id(pipe)]
                result = self._receive(worker, busy.get(worker))
                idle.append(worker)
                yield busy.pop(worker), result

    def _send(self, worker: int, name: str, task: Any) -> None:
        pipe = self._connections[worker]
        try:
            if worker not in self._told:
                self._told.add(worker)
                pipe.send_bytes(self._settings)
            pipe.send((name, task))
        except OSError:
            raise self._death(worker, name) from None

    def _receive(self, worker: int, name: str | None) -> Any:
        try:
            failed, result = self._connections[worker].recv()
        except (EOFError, OSError):
            raise self._death(worker, name) from None
        if failed:
            raise InputError(result)
        return result

    def _death(self, worker: int, name: str | None) -> InputError:
        code = self._processes[worker].wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (the system does that when memory runs out)"
        return InputError(
            f"worker {worker + 1} of {len(self._processes)}, process {self.pids[worker]}, {how} "
            f"while it {f'worked on {name}' if name else 'waited for work'}. {GO_ON}"
        )


def _describe(error: BaseException, name: str) -> str:
    """One line for an error that nobody foresaw."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(str(error).split())[:300]
    place = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
    return f"{name}: {type(error).__name__}: {what} ({place}). {GO_ON}"


def _serve(pipe: connection.Connection, work: str) -> None:
    module, function = work.split(":")
    do = getattr(importlib.import_module(module), function)
    settings = None
    while True:
        try:
            name, task = pipe.recv()
        except (EOFError, OSError):
            return  # the parent has gone
        if name is None:
            settings = task
            continue
        try:
            answer = (False, do(settings, task))
        except InputError as error:
            answer = (True, str(error))
        except Exception as error:
            answer = (True, _describe(error, name))
        del task
        pipe.send(answer)


def _main(descriptor: str, parent: str, work: str) -> None:
    if sys.platform == "linux":
        # The kernel kills this process when its parent dies, however busy it is.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    with contextlib.suppress(OSError):  # the parent has gone while a result was on its way
        _serve(connection.Connection(int(descriptor)), work)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
