"""Google's notice that this machine is about to go, and whether a run can save in the time left.

A preempted machine has 30 seconds. The metadata server tells of it at once; SIGTERM, which comes
when the machine shuts down, may reach a program late, or never in a container.
https://cloud.google.com/compute/docs/instances/preemptible#preemption-process
"""

import contextlib
import http.client
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

from tpu.local_tpu import metadata_host

NOTICE_SECONDS = 25  # of the 30 that Google gives, for the rest of a loop and a save
LONG_POLL_SECONDS = 60
PAUSE_SECONDS = 1.0  # between two questions; a server may answer each at once


class SaveTimer:
    """Tells, once, when a loop and a save take longer than a preempted machine has left."""

    def __init__(self, steps_per_loop: int):
        self._steps_per_loop = steps_per_loop
        self._told = False

    def warning(self, loop_seconds: float, save_seconds: float) -> str | None:
        """Takes times that were measured.

        Args:
          loop_seconds: of a whole loop on the device; 0 for one that does not count, such as the
            first after a start, which compiles.
          save_seconds: of a save.

        Returns:
          A line for the user the first time that they take too long, else None.
        """
        if self._told or not loop_seconds or loop_seconds + save_seconds <= NOTICE_SECONDS:
            return None
        self._told = True
        what = (
            f"Warning: a loop takes {loop_seconds:.1f} s and a save {save_seconds:.1f} s, and a "
            f"machine that is preempted has {NOTICE_SECONDS} s for both. "
        )
        left = NOTICE_SECONDS - save_seconds
        steps = int(self._steps_per_loop * left / loop_seconds)
        if steps >= 1:
            return f"{what}--steps_per_loop={steps} would do"
        if left > 0:
            return f"{what}One update alone takes longer: what was last saved is what stays"
        return f"{what}The save alone takes longer: what was last saved is what stays"


@contextlib.contextmanager
def watched(notice: Callable[[str], None]) -> Iterator[None]:
    """Asks Google's metadata server, where there is one, whether the machine is about to go.

    Args:
      notice: gets "preemption notice" or "maintenance notice", from a thread of its own.
    """
    host, stopped = metadata_host(), threading.Event()
    for key, begin, name, only_new in (
        ("preempted", "TRUE", "preemption notice", False),
        # It comes up to an hour ahead: the next start on the same machine must not stop again.
        ("maintenance-event", "TERMINATE", "maintenance notice", True),
    ):
        if host:
            url = f"http://{host}/computeMetadata/v1/instance/{key}"
            arguments = (url, begin, lambda name=name: notice(name), stopped, only_new)
            threading.Thread(target=_watch, args=arguments, name=name, daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


def _watch(
    url: str,
    begin: str,
    notice: Callable[[], None],
    stopped: threading.Event,
    only_new: bool,
) -> None:
    """Asks until the answer begins as it does where the machine is about to go.

    With `only_new` an answer counts after one that was another.
    """
    etag = None  # of the last answer; the first is wanted at once, the others when they change
    seen_other = not only_new
    while not stopped.is_set():
        value, etag = _ask(url, etag)
        if value.startswith(begin) and seen_other and not stopped.is_set():
            notice()
            return
        seen_other = seen_other or bool(value and not value.startswith(begin))
        stopped.wait(PAUSE_SECONDS)


def _ask(url: str, etag: str | None) -> tuple[str, str | None]:
    """Returns the answer and its ETag; nothing of both where the server is out of order."""
    if etag:
        query = {"wait_for_change": "true", "timeout_sec": LONG_POLL_SECONDS, "last_etag": etag}
        url = f"{url}?{urllib.parse.urlencode(query)}"
    # No proxy leads to a server that only this machine can see.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with opener.open(request, timeout=LONG_POLL_SECONDS + 10) as answer:
            value = answer.read(100).decode(errors="replace").strip()
            return value, answer.headers.get("ETag")
    except (OSError, ValueError, http.client.HTTPException):
        return "", None
