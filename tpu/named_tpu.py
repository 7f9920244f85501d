"""A TPU by its name: what Google's API tells of it, and why no run can start there.

It is looked up before TensorFlow is asked to connect, which can hardly tell one trouble from another.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from tpu import local_tpu, tpu_servers
from tpu.failures import Fault

LOOK_UP_SECONDS = 12.0  # one request with its retries; at the most two are made
LOGIN = "gcloud auth application-default login"
CREDENTIALS_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
SHOWN_NAMES = 10
_SEE_CLOUD = "`python -m tpu.cloud list --help`"


@dataclasses.dataclass(frozen=True)
class Node:
    """What Google's API tells about a TPU.

    Attributes:
      name: as the user gave it.
      state: such as READY, CREATING or PREEMPTED.
      health: such as HEALTHY; "" where nobody has looked yet.
      accelerator_type: such as v3-32.
      runtime_version: such as tpu-vm-tf-2.20.0-pod-pjrt.
      addresses: host:port of the TensorFlow server of each worker.
      zone: where it is.
      project: whose it is.
    """

    name: str
    state: str = ""
    health: str = ""
    accelerator_type: str = ""
    runtime_version: str = ""
    addresses: tuple[str, ...] = ()
    zone: str = ""
    project: str = ""

    @property
    def url(self) -> str:
        """The addresses as TensorFlow's resolver takes them, without asking the API once more."""
        return ",".join(f"grpc://{address}" for address in self.addresses)

    @property
    def place(self) -> str:
        """Its name and place, as commands take them."""
        zone = f" --zone={self.zone}" if self.zone else ""
        project = f" --project={self.project}" if self.project else ""
        return f"{self.name}{zone}{project}"

    def __str__(self) -> str:
        return f"{self.accelerator_type} {self.state}, {self.runtime_version}"


def find(name: str, zone: str = "", project: str = "") -> Node:
    """Asks Google's API for a TPU.

    Args:
      name: of the TPU.
      zone: "" for that of this machine.
      project: "" for that of this machine.

    Raises:
      Fault: it cannot be asked or knows no such TPU.
    """
    from tpu.cloud_errors import CloudError, NotFoundError
    from tpu.cloud_flags import NAME

    if not re.fullmatch(NAME, name):
        raise Fault(
            "expected local, a name such as my-tpu-1, or addresses such as grpc://10.0.0.2:8470",
            "Check: `python -m tpu.cloud list --help`",
        )
    _check_credentials_file()
    zone, project = _place(zone, project)
    try:
        from tpu.cloud_api import Api

        api = Api(project, zone, LOOK_UP_SECONDS)
        answer = api.call("nodes", "get", name=f"{api.parent}/nodes/{name}")
    except NotFoundError:
        raise _not_found(name, zone, project) from None
    except CloudError as error:
        raise _refused(error, zone, project) from None
    return dataclasses.replace(read_node(name, answer), zone=zone, project=project)


def read_node(name: str, answer: Mapping) -> Node:
    """Returns what the API's description of a TPU says."""
    endpoints = answer.get("networkEndpoints") or ()
    return Node(
        name=name,
        state=str(answer.get("state", "")),
        health=str(answer.get("health", "")),
        accelerator_type=str(answer.get("acceleratorType", "")),
        runtime_version=str(answer.get("runtimeVersion") or answer.get("tensorflowVersion") or ""),
        addresses=tuple(
            f"{e['ipAddress']}:{e.get('port') or tpu_servers.SERVER_PORT}"
            for e in endpoints
            if e.get("ipAddress")
        ),
    )


def node_fault(node: Node, tensorflow: str) -> Fault | None:
    """Returns why no run can start on a TPU of this description.

    Args:
      node: of the API.
      tensorflow: version here; "" for none.
    """
    if node.state in ("PREEMPTED", "TERMINATED"):
        return Fault(
            f"the TPU was taken away, its state is {node.state}",
            f"Remedy: `python -m tpu.cloud delete {node.place}`, then create it again; `python -m "
            "tpu.cloud supervise` does so by itself",
        )
    if node.state != "READY":
        return Fault(
            f"expected a TPU that is READY. Received: {node.state or 'no state'}",
            f"Remedy: `python -m tpu.cloud wait {node.place}`; a stopped one is started with `gcloud "
            f"compute tpus tpu-vm start {node.place}`",
        )
    if node.health.startswith("UNHEALTHY"):
        return Fault(
            f"the TPU is not healthy: {node.health}",
            f"Remedy: `gcloud compute tpus tpu-vm describe {node.place}` tells why; delete it and create "
            "it again where that lasts",
        )
    if not node.addresses:
        return Fault(
            "the API tells no address of a worker",
            f"Remedy: `python -m tpu.cloud delete {node.place}`, then create it again",
        )
    return tpu_servers.version_fault(node.runtime_version, tensorflow)


def _check_credentials_file() -> None:
    file = os.environ.get(CREDENTIALS_VARIABLE)
    if file and not os.access(file, os.R_OK):
        raise Fault(
            f"no credentials: expected a file that can be read in {CREDENTIALS_VARIABLE}. Received: {file}",
            f"Remedy: `unset {CREDENTIALS_VARIABLE}` and `{LOGIN}`, or the path of a key",
        )


def _place(zone: str, project: str) -> tuple[str, str]:
    """Returns zone and project, from Google's metadata where they were not given."""
    zone = zone or local_tpu.metadata("instance/zone").rpartition("/")[2]
    project = project or local_tpu.metadata("project/project-id")
    missing = [
        flag for flag, value in (("--tpu_zone", zone), ("--gcp_project", project)) if not value
    ]
    if missing:
        raise Fault(
            "no place to look for a TPU of this name: expected "
            f"{' and '.join(missing)} on a machine outside of Google's cloud. Received: none",
            "Remedy: `gcloud compute tpus tpu-vm list --zone=- --project=...` shows names with their "
            f"zones. Tried: this machine's own place. Check: --tpu_zone, --gcp_project, credentials "
            f"(`{LOGIN}`), and that --tpu is the name of a TPU",
        )
    return zone, project


def _not_found(name: str, zone: str, project: str) -> Fault:
    """The API does not tell whether name or zone is wrong: look where such a TPU is."""
    from tpu.cloud_api import Api
    from tpu.cloud_errors import CloudError

    try:
        names = [
            str(node.get("name", "")) for node in Api(project, "-", LOOK_UP_SECONDS).pages("nodes")
        ]
    except CloudError:
        names = []
    places = [
        text.split("/")[3] for text in names if text.split("/")[3:] and text.endswith(f"/{name}")
    ]
    if places:
        return Fault(
            f"wrong zone: no TPU of this name in {zone} of {project}. It is in {' and '.join(places)}",
            f"Remedy: --tpu_zone={places[0]}",
        )
    here = [text.rpartition("/")[2] for text in names if f"/{zone}/" in text]
    there = f"There: {', '.join(sorted(here)[:SHOWN_NAMES])}. " if here else ""
    return Fault(
        f"wrong name: no TPU of this name in {zone} of {project}",
        f"{there}Tried: Google's Cloud TPU API. Check: `python -m tpu.cloud list --zone=- --project="
        f"{project}`, --tpu_zone, --gcp_project; a preempted TPU that was deleted must be made anew",
    )


def _refused(error: Exception, zone: str, project: str) -> Fault:
    """Turns what the API's client says into the terms of a run's flags."""
    what, _, remedy = str(error).partition(" Remedy: ")
    what = what.rstrip(". ")
    if "is not found or access is unauthorized" in what:  # so Google answers for an unknown zone
        return Fault(
            f"wrong zone: {zone} is none that {project} may use ({what})",
            "Remedy: --tpu_zone=..., one of `gcloud compute tpus locations list --project="
            f"{project}`",
        )
    if what.startswith("credentials:"):
        what = f"no credentials: {what.partition(':')[2].strip()}"
    remedy = remedy.replace("check --project=", "check --gcp_project=")
    return Fault(what, f"Remedy: {remedy or _SEE_CLOUD}")
