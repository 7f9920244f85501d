"""The TensorFlow servers that drive a TPU's chips: whether they answer and can work with this machine."""

import concurrent.futures
import json
import os
import re
import socket
import urllib.request
from collections.abc import Sequence

from tpu import installation, local_tpu
from tpu.failures import NO_ANSWER, Fault

SERVER_PORT = 8470
VERSION_PORT = 8475
KNOCK_SECONDS = 8.0
VERSION_SECONDS = 3.0


def silent_fault(addresses: tuple[str, ...], runtime: str) -> Fault | None:
    """Knocks at all workers of a TPU; returns what to say where some do not answer.

    Args:
      addresses: host:port of each.
      runtime: version of the software that Google put on them, such as "tpu-ubuntu2204-base".
    """
    silent = knock(addresses)
    if not silent:
        return None
    return Fault(
        f"no TensorFlow server answers at {len(silent)} of its {len(addresses)} workers: {silent[0]}",
        "Check: that this machine is in the network of the TPU (its worker 0 is) and port "
        f"{SERVER_PORT} is open there; that its runtime, {runtime}, is one of TensorFlow's, "
        "tpu-vm-tf-*, on a pod tpu-vm-tf-*-pod*: no other starts such servers",
    )


def address_fault(address: str, tensorflow: str) -> Fault | None:
    """Returns why no run can start at grpc:// addresses; knocks there.

    A gRPC channel to a dead address waits forever.

    Args:
      address: grpc://host:port, of several workers with commas between.
      tensorflow: version here; "" for none.
    """
    addresses = []
    for single in address.split(","):
        match = re.fullmatch(r"grpc://([^/:]+|\[[^\]]+\]):(\d+)", single)
        if not match or not 0 < int(match[2]) < 65536:
            return Fault(
                "expected grpc://host:port",
                f"Received: {single}. Remedy: for instance --tpu=grpc://10.0.0.2:{SERVER_PORT}",
            )
        addresses.append(f"{match[1]}:{match[2]}")
    if silent := knock(addresses):
        return Fault(f"nothing answers at {silent[0]}", NO_ANSWER)
    return version_fault(_served_version(addresses[0]), tensorflow)


def knock(addresses: Sequence[str]) -> list[str]:
    """Returns "host:port (why)" for each address at which nothing listens."""

    def one(address: str) -> str:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
        except OSError as error:
            return f"{address} ({error.strerror or error})"
        return ""

    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        return [text for text in threads.map(one, addresses) if text]


def library_fault(machine: local_tpu.Machine, installed: installation.Installation) -> Fault | None:
    """Returns what is wrong where this process would take the chips that its own server needs."""
    is_tpu_build = any(
        d.claims_tensorflow and d.name == installation.TPU_BUILD for d in installed.values()
    )
    if not machine.chips or not is_tpu_build or os.environ.get("TPU_LOAD_LIBRARY") == "0":
        return None
    return Fault(
        "expected TPU_LOAD_LIBRARY=0 in the environment of a process that drives a slice from one of its "
        f"own machines. Received: {os.environ.get('TPU_LOAD_LIBRARY') or 'nothing'}; it would take the "
        "chips from the TensorFlow server here",
        "Remedy: `export TPU_LOAD_LIBRARY=0`, then start again, on worker 0 alone",
    )


def _served_version(address: str) -> str:
    """Returns the TensorFlow of a TPU node of the older kind, "" of any other."""
    url = f"http://{address.rpartition(':')[0]}:{VERSION_PORT}/requestversion"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=VERSION_SECONDS) as answer:
            return str(json.loads(answer.read(10_000)).get("currentVersion") or "")
    except Exception:  # whatever else listens there, it is asked for help only
        return ""


def version_fault(runtime: str, tensorflow: str) -> Fault | None:
    """Returns what is wrong where a TPU's runtime has another TensorFlow than this machine.

    Args:
      runtime: such as "tpu-vm-tf-2.20.0-pod-pjrt" or "2.20.0"; of others nothing is known.
      tensorflow: version here; "" for none.
    """
    match = re.match(r"(?:tpu-vm-tf-)?(\d+\.\d+)(\.|-|$)", runtime)
    here = re.match(r"\d+\.\d+", tensorflow)
    if not match or not here or match[1] == here[0]:
        return None
    return Fault(
        f"expected the TensorFlow of this machine, {tensorflow}, on the TPU. Received: {runtime}",
        f"Remedy: a TPU made with a runtime of TensorFlow {here[0]}, or TensorFlow {match[1]} here; "
        "where the workers run servers of your own, --tpu=grpc://host:port of each, with commas between",
    )
