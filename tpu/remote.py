"""Runs a command on the machines of a slice, through gcloud's ssh or another program's."""

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from tpu.cloud_errors import CloudError, UsageError, one_line, without_secrets

SSH = (
    "gcloud compute tpus tpu-vm ssh {name} --zone={zone} --project={project} --worker={worker} "
    "--quiet --command={command}"
)
FIELDS = ("name", "zone", "project", "worker", "command")
LOST = 255  # ssh's own status: no connection, or one that broke
CONNECTIONS = 64  # at a time; each is a process of this machine, gcloud's one of 50 MB
END_SECONDS = 10.0  # for an ssh that was told to end
SESSION_FOLDER = "/dev/shm"  # of a worker; empty after a restart, as its processes are gone
_print_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Shell:
    """A way to the machines of one slice.

    Attributes:
      name: of the slice.
      zone: and `project`, where it is.
      template: command line with {name} {zone} {project} {worker} {command} in it. It is taken apart
        before they are put in, so each stays within one argument, whatever it is.
    """

    name: str
    zone: str
    project: str
    template: str = SSH

    def arguments(self, worker: int | str, command: str) -> list[str]:
        """Returns the program and its arguments that run a command on a worker.

        Raises:
          CloudError: the template makes no sense.
        """
        try:
            words = shlex.split(self.template)
        except ValueError as error:
            raise self._bad_template(f"a command line ({error})") from None
        used = set(re.findall(r"\{(\w*)\}", self.template))
        if not words or not {"worker", "command"} <= used or used - set(FIELDS):
            names = " ".join(f"{{{field}}}" for field in FIELDS)
            raise self._bad_template(f"{{worker}} and {{command}} in it, and none but {names}")
        values = {
            "name": self.name,
            "zone": self.zone,
            "project": self.project,
            "worker": str(worker),
            "command": command,
        }
        return [re.sub(r"\{(\w+)\}", lambda match: values[match[1]], word) for word in words]

    def _bad_template(self, expected: str) -> UsageError:
        return UsageError(
            f"--ssh_command: expected {expected}. Received: {one_line(self.template)}"
        )

    def check(self) -> list[str]:
        """Makes sure that the program is there, before anything is paid for; returns its arguments.

        Raises:
          CloudError: the template makes no sense, or there is no such program on this machine.
        """
        arguments = self.arguments(0, "")
        if not arguments[0] or shutil.which(arguments[0]) is None:
            raise CloudError(
                f"--ssh_command: expected a program of this machine. Received: {arguments[0] or 'none'}, "
                "which is not there. Remedy: install the Google Cloud CLI, or name another program"
            )
        return arguments

    def start(self, worker: int, command: str) -> "RemoteCommand":
        """Starts a command on a worker.

        Raises:
          CloudError: as `check`, or the program cannot be started.
        """
        self.check()
        arguments = self.arguments(worker, command)
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for this program, which tells what still exists
            )
        except (OSError, ValueError) as error:
            raise CloudError(f"--ssh_command: {arguments[0]} cannot be started ({error})") from None
        return RemoteCommand(worker, process)

    def run(
        self, workers: Sequence[int], command: str, timeout: float | None = None
    ) -> dict[int, int]:
        """Runs a command on workers, on up to `CONNECTIONS` of them at the same time.

        Returns:
          The exit status of each; 255 where ssh itself failed.

        Raises:
          TimeoutError: some are still at work after `timeout` seconds; their connections are ended.
        """
        until = None if timeout is None else time.monotonic() + timeout
        started: list[RemoteCommand] = []
        over = threading.Event()

        def run_one(worker: int) -> int:
            remote = self.start(worker, command)
            started.append(remote)
            if over.is_set():
                remote.stop()  # it was not yet there when the others were stopped
            return remote.wait(until and max(until - time.monotonic(), 0.0))

        threads = concurrent.futures.ThreadPoolExecutor(CONNECTIONS)
        with stopped_together(started):
            try:
                statuses = [threads.submit(run_one, worker) for worker in workers]
                return {w: status.result() for w, status in zip(workers, statuses, strict=True)}
            finally:
                over.set()
                threads.shutdown(wait=False, cancel_futures=True)


class RemoteCommand:
    """A command at work on a worker, whose output is printed line by line behind its number."""

    def __init__(self, worker: int, process: subprocess.Popen):
        self.worker = worker
        self._process = process
        assert process.stdout is not None
        self._printer = threading.Thread(target=self._print, args=(process.stdout,), daemon=True)
        self._printer.start()

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status; one that a signal ended has 128 and its number.

        Raises:
          TimeoutError: it is still at work.
        """
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        self._printer.join(END_SECONDS)  # what it left running may hold its output open
        return status if status >= 0 else 128 - status

    def stop(self) -> None:
        """Ends the connection. What it started on the worker may go on."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return  # its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
                return

    def _print(self, output: IO[str]) -> None:
        with contextlib.suppress(ValueError):  # closed
            for line in output:
                with _print_lock:
                    print(f"[{self.worker}] {without_secrets(line.rstrip())}", flush=True)


@contextlib.contextmanager
def stopped_together(commands: list[RemoteCommand]) -> Iterator[None]:
    """Ends all connections where the block fails or is interrupted."""
    try:
        yield
    except BaseException:
        for command in list(commands):
            command.stop()
        raise


def parse_workers(text: str, count: int | None) -> list[int]:
    """Returns the numbers of the workers that a flag names.

    Args:
      text: "all", or numbers with commas between them.
      count: how many workers there are; None where it is not known.

    Raises:
      CloudError: it makes no sense.
    """
    if text == "all":
        return list(range(count or 1))
    if re.fullmatch(r"\d{1,5}(,\d{1,5})*", text, re.ASCII):
        workers = sorted({int(number) for number in text.split(",")})
        if count is None or workers[-1] < count:
            return workers
    limit = "" if count is None else f" below {count}"
    raise UsageError(
        f"--workers={text}: expected all, or numbers{limit} with commas between them. Received: {text}"
    )


def session(name: str, command: str, stop_seconds: int) -> str:
    """Wraps a shell command so that it outlives a lost connection and can be stopped by `stop`.

    First it stops what an earlier connection may have left at work, for two runs would fight over
    the chips. The number of its process group is kept where a restart of the machine forgets it.
    """
    file = _session_file(name)
    # Asked to end, the shell stays for the status of what it runs.
    forget = f'[ "$(cat {file} 2>/dev/null)" = $$ ] && rm -f {file}'
    inner = f"trap : TERM; trap {shlex.quote(forget)} EXIT; echo $$ > {file}\n{command}"
    return f"{stop(name, stop_seconds)}; setsid -w sh -c {shlex.quote(inner)}"


def stop(name: str, seconds: int) -> str:
    """Returns a shell command that asks what `session` started to end, and makes it after a while."""
    file = _session_file(name)
    return (
        f'g=$(cat {file} 2>/dev/null); if [ -n "$g" ] && kill -TERM "-$g" 2>/dev/null; then n=0; '
        f'while [ $n -lt {5 * seconds} ] && kill -0 "-$g" 2>/dev/null; do sleep 0.2; n=$((n+1)); done; '
        f'kill -KILL "-$g" 2>/dev/null; fi; rm -f {file}'
    )


def _session_file(name: str) -> str:
    return f"{SESSION_FOLDER}/tpu-run-{name}-$(id -u)"


def report(statuses: dict[int, int], started: float) -> int:
    """Prints the exit status of each worker; returns the highest."""
    for worker, status in statuses.items():
        lost = " (ssh: no connection, or one that broke)" if status == LOST else ""
        print(f"worker {worker}: exit {status}{lost}", flush=True)
    failed = sum(map(bool, statuses.values()))
    seconds = time.monotonic() - started
    print(f"{len(statuses) - failed} of {len(statuses)} succeeded in {seconds:.0f} s", flush=True)
    sys.stdout.flush()
    return max(statuses.values(), default=0)
