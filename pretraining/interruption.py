"""Requests to stop: noted when they come, obeyed between two loops on the device."""

import contextlib
import os
import signal
from collections.abc import Iterator

from pretraining import preemption


class Interrupted(Exception):
    """The run was asked to stop; raised between two loops, when the weights are consistent."""


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Notes SIGINT, SIGTERM and Google's notices in the list that it yields.

    A SIGINT after another signal ends the process at once.
    """
    received: list[str] = []

    def note(name: str) -> None:
        received.append(name)
        # Not print: a signal may have come in the middle of one.
        os.write(2, f"{name}: stopping at the end of this loop\n".encode())

    def note_signal(number: int, frame) -> None:
        if number == signal.SIGINT and {"SIGINT", "SIGTERM"} & set(received):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        note(signal.Signals(number).name)

    before = {
        number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with preemption.watched(note):
            yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
