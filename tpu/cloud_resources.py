"""TPU VMs and queued resources: what is asked for, in which state it is, waiting, and deleting.

A TPU VM, a "node" to the API, comes at once or not at all; a queued resource waits in a line and
then holds a node, here always one of the same name.
https://cloud.google.com/tpu/docs/queued-resources
"""

import dataclasses
import datetime
import re
import time
from collections.abc import Callable
from typing import Any

from tpu.cloud_api import Api
from tpu.cloud_errors import CloudError, ExistsError, NotFoundError, WaitedTooLongError, one_line
from tpu.cloud_requests import CREATION, SliceRequest

LOOK_SECONDS = 10.0  # between two looks at a state
APPEAR_SECONDS = 120.0  # in which what was just asked for may not show yet
READY, COMING, STOPPED, DEAD, GOING, GONE = "ready coming stopped dead going gone".split()
NODE_STATES = {
    "READY": READY,
    "STOPPED": STOPPED,
    "STOPPING": STOPPED,
    "PREEMPTED": DEAD,
    "TERMINATED": DEAD,
    "HIDING": DEAD,
    "HIDDEN": DEAD,
    "DELETING": GOING,
}
QUEUED_STATES = {
    "ACTIVE": READY,
    "FAILED": DEAD,
    "SUSPENDED": DEAD,
    "SUSPENDING": DEAD,
    "DELETING": GOING,
}


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the API says of a slice at one moment.

    Attributes:
      node: the TPU VM; None where there is none.
      queued: the queued resource; None where there is none.
    """

    node: dict[str, Any] | None
    queued: dict[str, Any] | None

    @property
    def state(self) -> str:
        """One of READY, COMING, STOPPED, DEAD, GOING and GONE; a state that is new is COMING."""
        of_queued = _queued_state(self.queued)
        if self.queued is not None and QUEUED_STATES.get(of_queued) != READY:
            return QUEUED_STATES.get(of_queued, COMING)
        if self.node is None:
            return COMING if self.queued is not None else GONE
        return NODE_STATES.get(str(self.node.get("state")), COMING)

    @property
    def said(self) -> str:
        """The states in Google's words."""
        words = []
        if self.queued is not None:
            words.append(f"queued resource {_queued_state(self.queued)}{_failure(self.queued)}")
        if self.node is not None:
            words.append(f"TPU VM {self.node.get('state')}")
        return ", ".join(words) or "nothing of this name"

    @property
    def creation(self) -> str:
        """The label that says which request made it; "" where there is none."""
        return str(
            _labels(self.node).get(CREATION) or _labels(_spec(self.queued)).get(CREATION) or ""
        )

    @property
    def incarnation(self) -> str:
        """What tells the slice from an earlier one of the same name."""
        node = self.node or {}
        return self.creation or str(node.get("id") or node.get("createTime") or "")

    @property
    def created(self) -> float | None:
        """When the TPU VM was created, in seconds by the clock; None where it is not said."""
        text = re.sub(r"(\.\d+)?Z$", "+00:00", str((self.node or {}).get("createTime")))
        try:
            return datetime.datetime.fromisoformat(text).timestamp()
        except ValueError:
            return None

    @property
    def num_workers(self) -> int:
        """How many machines it has."""
        return len((self.node or {}).get("networkEndpoints") or ()) or 1


def look(api: Api, name: str) -> Sight:
    """Asks for a slice by its name; one of which there is nothing is no error."""
    found: dict[str, dict[str, Any] | None] = {}
    for kind in ("queuedResources", "nodes"):
        try:
            found[kind] = api.call(kind, "get", name=f"{api.parent}/{kind}/{name}")
        except NotFoundError:
            found[kind] = None
    return Sight(node=found["nodes"], queued=found["queuedResources"])


def create(api: Api, request: SliceRequest, creation: str) -> None:
    """Asks for a slice; returns when the request is accepted.

    Args:
      api: of the project and zone.
      request: the slice.
      creation: a word that no other request uses. Where the answer was lost, it tells whether what
        is there by now came of this request.

    Raises:
      ExistsError: there is another one of this name.
      CloudError: it is refused.
    """
    kind, arguments = request.arguments(api, creation)
    try:
        operation = api.call(kind, "create", **arguments)
    except ExistsError:
        if look(api, request.name).creation != creation:
            raise
        return
    if reason := _operation_error(operation):
        raise CloudError(f"create {request.name}: {api.clean(reason)}")


def wait_until_ready(
    api: Api,
    name: str,
    timeout: float,
    say: Callable[[str], None],
    appear_seconds: float = 0.0,
) -> Sight:
    """Waits until a slice can be used, and says each state that it passes through.

    Args:
      api: of the project and zone.
      name: of the slice.
      timeout: seconds.
      say: takes a line.
      appear_seconds: for how long it may not be there yet.

    Returns:
      The slice, READY or, for the caller to judge, DEAD, STOPPED or GOING.

    Raises:
      NotFoundError: it is not there; the text has the reason where its creation failed.
      WaitedTooLongError: the time is over.
    """
    started, last = time.monotonic(), ""
    while True:
        sight = look(api, name)
        passed = time.monotonic() - started
        if sight.said != last:
            last = sight.said
            say(f"{name}: {api.clean(last)}")
        if sight.state == GONE:
            reason = creation_error(api, name)
            if reason or passed >= appear_seconds:
                failed = f"; its creation failed: {reason}" if reason else ""
                raise nothing(api, name, failed)
        elif sight.state != COMING:
            return sight
        if passed + LOOK_SECONDS > timeout:
            raise WaitedTooLongError(
                f"{name}: expected it to be ready within {timeout:.0f} s. Received: {last}. Remedy: a "
                "longer --timeout; it goes on coming, and costs money once it is there"
            )
        time.sleep(LOOK_SECONDS)


def nothing(api: Api, name: str, more: str = "") -> NotFoundError:
    """Says that there is nothing of a name."""
    place = f"--zone={api.zone} --project={api.project}"
    return NotFoundError(
        f"{name}: expected a TPU VM or queued resource in {place}. Received: none of this name{more}. "
        f"Remedy: `python -m tpu.cloud list {place}` shows what there is"
    )


def delete(api: Api, name: str, timeout: float, say: Callable[[str], None]) -> bool:
    """Deletes the queued resource of a name with its TPU VM, or else the TPU VM, and sees it gone.

    Returns:
      Whether there was anything.

    Raises:
      CloudError: it is refused, or the TPU VM belongs to a queued resource of another name.
      WaitedTooLongError: it is still there when the time is over.
    """
    sight = look(api, name)
    if sight.state == GONE:
        return False
    owner = str((sight.node or {}).get("queuedResource") or "").rpartition("/")[2]
    if sight.queued is None and owner not in ("", name):
        raise CloudError(
            f"{name}: expected a TPU VM of its own. Received: one of the queued resource {owner}. "
            f"Remedy: delete {owner}, which deletes all its TPU VMs"
        )
    started = time.monotonic()
    if sight.state != GOING:
        _ask_to_delete(api, name, sight)
        sight = look(api, name)
    while sight.state != GONE:
        if time.monotonic() - started > timeout:
            raise WaitedTooLongError(
                f"{name}: expected it to be gone within {timeout:.0f} s. Received: {sight.said}. "
                "Remedy: ask again; it may still cost money"
            )
        time.sleep(min(LOOK_SECONDS, timeout))
        sight = look(api, name)
    say(f"{name}: deleted")
    return True


def _ask_to_delete(api: Api, name: str, sight: Sight) -> None:
    kind = "nodes" if sight.queued is None else "queuedResources"
    force = {} if sight.queued is None else {"force": True}
    try:
        operation = api.call(kind, "delete", name=f"{api.parent}/{kind}/{name}", **force)
    except NotFoundError:  # gone meanwhile, or by a request whose answer was lost
        return
    if reason := _operation_error(operation):
        raise CloudError(f"delete {name}: {api.clean(reason)}")


def creation_error(api: Api, name: str) -> str:
    """Returns why the last creation of a TPU VM of this name failed; "" where it cannot be told."""
    try:
        answer = api.call("operations", "list", name=api.parent, pageSize=100)
    except CloudError:
        return ""
    found = []
    for operation in answer.get("operations") or ():
        metadata = operation.get("metadata") or {}
        target, verb = str(metadata.get("target")), str(metadata.get("verb", ""))
        if target.endswith(f"/{name}") and "create" in verb.lower():
            found.append((str(metadata.get("createTime")), _operation_error(operation)))
    return api.clean(max(found)[1]) if found else ""


def _operation_error(operation: dict[str, Any]) -> str:
    error = operation.get("error")
    if not isinstance(error, dict):
        return ""
    return one_line(str(error.get("message") or f"code {error.get('code')}"))


def _queued_state(queued: dict[str, Any] | None) -> str:
    state = (queued or {}).get("state")
    return str(state.get("state") if isinstance(state, dict) else state)


def _failure(queued: dict[str, Any]) -> str:
    state = queued.get("state")
    data = state.get("failedData") if isinstance(state, dict) else None
    error = data.get("error") if isinstance(data, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f" ({one_line(str(message))})" if message else ""


def _labels(node: dict[str, Any] | None) -> dict[str, Any]:
    labels = (node or {}).get("labels")
    return labels if isinstance(labels, dict) else {}


def _spec(queued: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the node for which a queued resource asks."""
    specs = ((queued or {}).get("tpu") or {}).get("nodeSpec") or ()
    return specs[0].get("node") if specs and isinstance(specs[0], dict) else None
