"""The TPU chips of this machine: how many, of which slice, who holds them, and why `local` cannot work.

Nothing here touches the chips or imports TensorFlow, which takes hold of them.
"""

import contextlib
import dataclasses
import http.client
import os
import pathlib
import re
import urllib.request
from collections.abc import Mapping

from tpu import installation
from tpu.failures import Fault

METADATA_SECONDS = 3.0
GOOGLE_PCI_VENDOR = "0x1ae0"
# Of a TPU chip, versions 2 to 7; Google's network card has another. From jax/_src/hardware_utils.py.
TPU_PCI_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
LOCK_FILE = "tmp/libtpu_lockfile"  # libtpu locks it as long as it has the chips
_PRODUCT_NAME = "/sys/class/dmi/id/product_name"
# Set by a user who takes one machine of a slice for itself; libtpu's newer and older name.
_BOUNDS = ("TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this machine has of a TPU.

    Attributes:
      chips: how many TPU chips it sees.
      accelerator_type: of its slice, such as "v3-32"; "" where nobody tells.
      hosts: machines of its slice; 1 where nobody tells of others.
      holder: the other process that holds the chips, such as "4711 (python3)"; "" for none.
    """

    chips: int = 0
    accelerator_type: str = ""
    hosts: int = 1
    holder: str = ""

    def __str__(self) -> str:
        hosts = f", one of the {self.hosts} machines" if self.hosts > 1 else ""
        return f"{self.chips} TPU chips{hosts} of {self.accelerator_type or 'a slice'}"


def read_machine(
    root: pathlib.Path = pathlib.Path("/"), environment: Mapping[str, str] = os.environ
) -> Machine:
    """Looks at the devices of this machine, its processes, its environment and Google's metadata.

    Args:
      root: of the file system; another one in tests.
      environment: variables that the machine's owner or Google has set.
    """
    found = chips(root)
    told = environment.get("TPU_ACCELERATOR_TYPE", "") or metadata(
        "instance/attributes/accelerator-type"
    )
    if not found and not told:
        return Machine()
    return Machine(found, told, _hosts(environment), holder(root))


def fault(machine: Machine, installed: installation.Installation) -> Fault | None:
    """Returns why a process of this machine cannot drive its TPU; None where nothing speaks against it."""
    if not machine.chips:
        told = (
            f", although it belongs to a {machine.accelerator_type}"
            if machine.accelerator_type
            else ""
        )
        return Fault(
            f"expected a TPU VM. Received: a machine without TPU chips{told}",
            "Tried: its PCI bus and /dev/accel*, for libtpu. Check: that this is a TPU VM (`python -m "
            "tpu.cloud create` makes one); that a container has --privileged. Without --tpu it runs on "
            "GPUs or the CPU",
        )
    if found := installation.tensorflow_fault(installed, on_tpu=True):
        return found
    for found in installation.version_faults(installed):
        if "libtpu" in found.what:
            return found
    if machine.hosts > 1:
        return Fault(
            f"expected a slice of one machine. Received: {machine}, which start together only",
            "Remedy: on worker 0 alone, `TPU_LOAD_LIBRARY=0` in the environment and the name of the TPU "
            "in place of local, with --tpu_zone and --gcp_project: it drives the whole slice",
        )
    if os.environ.get("TPU_LOAD_LIBRARY") == "0":
        return Fault(
            "expected no TPU_LOAD_LIBRARY=0 beside local, with which TensorFlow leaves the chips alone. "
            "Received: it is in the environment",
            "Remedy: `unset TPU_LOAD_LIBRARY`, then start again",
        )
    if machine.holder:
        return Fault(
            f"the TPU is busy: process {machine.holder} holds it",
            f"Remedy: wait for it or end it (`kill {machine.holder.split()[0]}`), then start again",
        )
    return None


def chips(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Returns how many TPU chips this machine sees."""
    count = 0
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor = (folder / "vendor").read_text().strip()
            device = (folder / "device").read_text().strip()
            count += vendor == GOOGLE_PCI_VENDOR and device in TPU_PCI_DEVICES
    # A container may be given the devices and not the bus.
    return count or len(list((root / "dev").glob("accel*")))


def holder(root: pathlib.Path = pathlib.Path("/")) -> str:
    """Returns the process, other than this one, that holds the chips or libtpu's lock; "" for none."""
    own = str(os.getpid())
    for process in (root / "proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of another user, or ended by now
            for link in (process / "fd").iterdir():
                held = re.fullmatch(r"/dev/(accel|vfio/)\d+", os.readlink(link))
                if held and process.name != own:
                    return _named(process)
    pid = _lock_owner(root)
    return _named(root / "proc" / pid) if pid and pid != own else ""


def _lock_owner(root: pathlib.Path) -> str:
    """The kernel shows everybody's locks, by the number of the file, where processes do not show."""
    with contextlib.suppress(OSError):
        inode = (root / LOCK_FILE).stat().st_ino
        for line in (root / "proc/locks").read_text().splitlines():
            fields = line.split()
            # 1: POSIX ADVISORY WRITE 4711 fe:00:2146309 0 EOF; one who waits has an arrow more.
            if len(fields) == 8 and fields[5].rpartition(":")[2] == str(inode):
                return fields[4]
    return ""


def _named(process: pathlib.Path) -> str:
    with contextlib.suppress(OSError):
        return f"{process.name} ({(process / 'comm').read_text().strip()})"
    return process.name


def _hosts(environment: Mapping[str, str]) -> int:
    """Returns how many machines start together: what was set by hand, then Kubernetes, then Google."""
    if any(environment.get(name) == "1,1,1" for name in _BOUNDS):
        return 1
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    names = names or metadata("instance/attributes/worker-network-endpoints")
    return max(len([name for name in names.split(",") if name.strip()]), 1)


def metadata_host() -> str:
    """Returns the address of Google's metadata server; "" on a machine that is not Google's."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    if os.environ.get("NO_GCE_CHECK", "").lower() == "true":
        return ""
    with contextlib.suppress(OSError), open(_PRODUCT_NAME) as file:
        if "Google" in file.read():
            return "metadata.google.internal"
    return ""


def metadata(path: str) -> str:
    """Returns what Google tells this machine about itself; "" where it tells nothing.

    Args:
      path: such as "project/project-id" or "instance/attributes/accelerator-type".
    """
    host = metadata_host()
    if not host:
        return ""
    # No proxy leads to a server that only this machine can see.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://{host}/computeMetadata/v1/{path}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with opener.open(request, timeout=METADATA_SECONDS) as answer:
            return answer.read(100_000).decode(errors="replace").strip()
    except (OSError, ValueError, http.client.HTTPException):
        return ""
