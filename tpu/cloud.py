"""Creates, uses, supervises and deletes TPU slices: `python -m tpu.cloud --help`.

It deletes what was named on the command line, and, as a supervisor, what it created itself.
"""

import argparse
import contextlib
import json
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

from tpu import cloud_flags, cloud_preview, cloud_resources, remote
from tpu.cloud_api import PATIENCE_SECONDS, Api
from tpu.cloud_errors import CloudError, UsageError, without_secrets
from tpu.command_line import USAGE_ERROR
from tpu.supervisor import Supervisor
from tpu.supervisor_state import StateFile

FAILED = 1


class Interrupted(BaseException):
    """Somebody wants this program to end.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def main(argv: list[str]) -> int:
    """Does what the command line asks for; returns the exit status."""
    flags, command = _read(argv)
    try:
        with _interruptible():
            return COMMANDS[flags.command](flags, command)
    except CloudError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR if isinstance(error, UsageError) else FAILED
    except Interrupted as interruption:
        if flags.command in ("create", "wait", "run", "delete"):
            print(
                f"interrupted. {flags.name} may exist and cost money; this deletes it: "
                f"{_own_command('delete', flags)}",
                file=sys.stderr,
                flush=True,
            )
        return 128 + interruption.number


def create(flags: argparse.Namespace, command: str) -> int:
    """Asks for a slice."""
    api, request = _api(flags), cloud_flags.slice_request(flags)
    cloud_flags.check_runtime(request.accelerator_type, request.version)
    creation = uuid.uuid4().hex
    if flags.dry_run:
        kind, arguments = request.arguments(api, creation)
        cloud_preview.show(api, kind, "create", **arguments)
        return 0
    cloud_resources.create(api, request, creation)
    print(f"{flags.name}: asked for {request.accelerator_type} in {flags.zone}")
    print(
        f"wait for it: {_own_command('wait', flags)}\ndelete it:   {_own_command('delete', flags)}"
    )
    return 0


def wait(flags: argparse.Namespace, command: str) -> int:
    """Waits until a slice is ready."""
    api = _api(flags)
    if flags.dry_run:
        cloud_preview.show_look(api, flags.name)
        return 0
    sight = cloud_resources.wait_until_ready(api, flags.name, flags.timeout, _say)
    if sight.state != cloud_resources.READY:
        raise CloudError(
            f"{flags.name}: expected it to become ready. Received: {api.clean(sight.said)}. Remedy: "
            f"{_own_command('delete', flags)}, then create it again"
        )
    plural = "" if sight.num_workers == 1 else "s"
    print(f"{flags.name}: ready, {sight.num_workers} worker{plural}")
    return 0


def list_all(flags: argparse.Namespace, command: str) -> int:
    """Prints a line for each TPU VM and queued resource."""
    api = _api(flags)
    if flags.dry_run:
        for kind in ("queuedResources", "nodes"):
            cloud_preview.show(api, kind, "list", parent=api.parent)
        return 0
    lines = [
        line for kind in ("queuedResources", "nodes") for line in cloud_preview.lines(api, kind)
    ]
    nothing = f"no TPU VM and no queued resource in {flags.zone} of {flags.project}"
    print("\n".join(lines) or nothing)
    return 0


def describe(flags: argparse.Namespace, command: str) -> int:
    """Prints what the API knows of a slice, as JSON."""
    api = _api(flags)
    if flags.dry_run:
        cloud_preview.show_look(api, flags.name)
        return 0
    sight = cloud_resources.look(api, flags.name)
    if sight.state == cloud_resources.GONE:
        raise cloud_resources.nothing(api, flags.name)
    found = {"state": sight.state, "queued_resource": sight.queued, "tpu_vm": sight.node}
    print(api.clean(json.dumps(cloud_preview.without_metadata(found), indent=2)))
    return 0


def run(flags: argparse.Namespace, command: str) -> int:
    """Runs a command on workers; returns the highest of their exit statuses."""
    shell = remote.Shell(flags.name, flags.zone, flags.project, flags.ssh_command)
    every = flags.workers == "all"
    workers = remote.parse_workers(flags.workers, None)
    if flags.dry_run:
        if every:
            cloud_preview.show_look(_api(flags), flags.name)
        for worker in ["WORKER"] if every else workers:
            print(_shown(shell.arguments(worker, command)))
        return 0
    shell.check()
    if every:
        api = _api(flags)
        sight = cloud_resources.look(api, flags.name)
        if sight.state == cloud_resources.GONE:
            raise cloud_resources.nothing(api, flags.name)
        if sight.state != cloud_resources.READY:
            raise CloudError(
                f"{flags.name}: expected a slice that is ready. Received: {sight.said}. Remedy: "
                f"{_own_command('wait', flags)}"
            )
        workers = remote.parse_workers("all", sight.num_workers)
    started = time.monotonic()
    return remote.report(shell.run(workers, command), started)


def delete(flags: argparse.Namespace, command: str) -> int:
    """Deletes a slice by its name."""
    api = _api(flags)
    if flags.dry_run:
        cloud_preview.show_look(api, flags.name)
        print("# then, where there is a queued resource:")
        queued = f"{api.parent}/queuedResources/{flags.name}"
        cloud_preview.show(api, "queuedResources", "delete", name=queued, force=True)
        print("# else:")
        cloud_preview.show(api, "nodes", "delete", name=f"{api.parent}/nodes/{flags.name}")
        return 0
    if not cloud_resources.delete(api, flags.name, flags.timeout, _say):
        raise cloud_resources.nothing(api, flags.name)
    return 0


def supervise(flags: argparse.Namespace, command: str) -> int:
    """Keeps a run going until it is done."""
    api, request = _api(flags), cloud_flags.slice_request(flags)
    plan = cloud_flags.supervision_plan(flags, request, command)
    shell = remote.Shell(flags.name, flags.zone, flags.project, flags.ssh_command)
    if flags.dry_run:
        cloud_preview.show_look(api, flags.name)
        kind, arguments = request.arguments(api, "0" * 32)
        print("# where there is nothing of this name:")
        cloud_preview.show(api, kind, "create", **arguments)
        if plan.setup:
            print(_shown(shell.arguments("WORKER", plan.setup)))
        session = remote.session(flags.name, plan.command, plan.stop_seconds)
        print(_shown(shell.arguments(0, session)))
        return 0
    shell.check()
    supervisor = Supervisor(
        api, shell, plan, StateFile(flags.state_file or f"{flags.name}.tpu.json")
    )
    try:
        return supervisor.run()
    except Interrupted:
        print(supervisor.what_exists(), flush=True)
        raise


COMMANDS = {
    "create": create,
    "wait": wait,
    "list": list_all,
    "describe": describe,
    "run": run,
    "delete": delete,
    "supervise": supervise,
}


def _read(argv: list[str]) -> tuple[argparse.Namespace, str]:
    """Returns the flags, and as one text what stands behind `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    words = argv[at + 1 :]
    parser = cloud_flags.parser()
    flags = parser.parse_args(argv[:at])
    takes_command = flags.command in ("run", "supervise")
    if takes_command != any(word.strip() for word in words):
        parser.error(
            f"{flags.command}: expected {'a' if takes_command else 'no'} command behind --. Received: "
            f"{shlex.join(words) or 'none'}"
        )
    # One word is a text for the shell there; several are a program and its arguments.
    return flags, words[0] if len(words) == 1 else shlex.join(words)


def _api(flags: argparse.Namespace) -> Api:
    return Api(flags.project, flags.zone, patience=min(flags.timeout, PATIENCE_SECONDS))


def _own_command(command: str, flags: argparse.Namespace) -> str:
    return (
        f"python -m tpu.cloud {command} {flags.name} --zone={flags.zone} --project={flags.project}"
    )


def _shown(arguments: list[str]) -> str:
    return without_secrets(shlex.join(arguments))


def _say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into `Interrupted` while the block runs."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
