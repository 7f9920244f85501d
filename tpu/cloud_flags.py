"""The command line of `tpu.cloud`."""

import argparse
import math
import re
import sys

from tpu.chips import Slice, parse_slice
from tpu.cloud_errors import UsageError
from tpu.cloud_requests import SliceRequest
from tpu.command_line import Parser
from tpu.remote import SSH
from tpu.supervisor_plan import Plan

NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
PLACE = r"[a-z0-9][-a-z0-9.:]{0,99}"
LABEL = r"[a-z0-9_-]{0,63}"
WAIT_SECONDS = 3600.0
SUPERVISE_WAIT_SECONDS = 86400.0
MAX_RECREATIONS = 20
VERSION_HELP = (
    "runtime: tpu-vm-tf-X.Y.Z with the TensorFlow that the run uses, -pod behind it where the slice "
    "has several hosts, then -pjrt or -se where Google's list has it "
    "(https://cloud.google.com/tpu/docs/runtimes), such as tpu-vm-tf-2.19.0-pod-pjrt"
)


def parser() -> Parser:
    """Returns the parser of all commands."""
    top = Parser(prog="python -m tpu.cloud", description="TPU VMs: create, use, supervise, delete.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    created = _command(commands, "create", "ask for a slice; returns when the request is accepted")
    _slice_flags(created)
    waited = _command(commands, "wait", "wait until a slice is ready")
    _timeout(waited, WAIT_SECONDS, "until it must be ready")
    listed = _command(
        commands, "list", "show what there is in a zone; --zone=- for all", named=False
    )
    described = _command(commands, "describe", "show all that the API knows of a slice")
    for quick in (created, listed, described):
        _timeout(quick, 60.0, "for a request that meets trouble, with its retries")
    ran = _command(commands, "run", "run a command on workers: run NAME ... -- COMMAND")
    ran.add_argument("--workers", default="all", help="all, or numbers such as 0 or 1,3")
    _ssh(ran)
    _timeout(ran, 60.0, "for a request that meets trouble, with its retries")
    deleted = _command(commands, "delete", "delete a slice, and the queued resource of its name")
    _timeout(deleted, 900.0, "until it must be gone")
    supervised = _command(
        commands, "supervise", "keep a run going until it is done: supervise NAME ... -- COMMAND"
    )
    _slice_flags(supervised)
    _supervise_flags(supervised)
    return top


def slice_request(flags: argparse.Namespace) -> SliceRequest:
    """Returns the slice that the flags of create or supervise ask for."""
    metadata = dict(flags.metadata)
    if flags.startup_script is not None:
        metadata["startup-script"] = flags.startup_script
    return SliceRequest(
        name=flags.name,
        accelerator_type=flags.accelerator_type,
        version=flags.version,
        spot=flags.spot,
        queued=flags.queued,
        network=flags.network,
        subnetwork=flags.subnetwork,
        internal_ips=flags.internal_ips,
        service_account=flags.service_account,
        labels=dict(flags.labels),
        metadata=metadata,
    )


def supervision_plan(flags: argparse.Namespace, request: SliceRequest, command: str) -> Plan:
    """Returns what the flags of supervise ask for.

    Raises:
      CloudError: they contradict each other.
    """
    known = check_runtime(request.accelerator_type, request.version)
    if flags.price_per_chip_hour and known is None:
        raise UsageError(
            f"--price_per_chip_hour: expected an --accelerator_type of which the chips are known. "
            f"Received: {request.accelerator_type}. Remedy: leave the price out"
        )
    if flags.budget_money and not flags.price_per_chip_hour:
        raise UsageError(
            f"--budget_money: expected --price_per_chip_hour beside it. Received: {flags.budget_money:g} alone"
        )
    price_per_hour = (flags.price_per_chip_hour or 0.0) * (known.num_chips if known else 0)
    hours = flags.budget_hours
    if flags.budget_money:
        hours = min(hours, flags.budget_money / price_per_hour)
    return Plan(
        request=request,
        command=command,
        setup=flags.setup,
        budget_seconds=hours * 3600,
        max_recreations=flags.max_recreations,
        timeout=flags.timeout,
        price_per_hour=price_per_hour,
        adopt=flags.adopt,
        keep=flags.keep,
    )


def check_runtime(accelerator_type: str, version: str) -> Slice | None:
    """Warns of a runtime that does not fit the slice; returns the slice where it is a known one."""
    try:
        known = parse_slice(accelerator_type)
    except ValueError as error:
        print(f"Warning: --accelerator_type: {error}", file=sys.stderr)
        return None
    if version.startswith("tpu-vm-tf-") and (known.num_hosts > 1) != ("-pod" in version):
        wanted = "one with -pod" if known.num_hosts > 1 else "one without -pod"
        print(
            f"Warning: --version={version}: expected {wanted}, for {accelerator_type} has "
            f"{known.num_hosts} hosts",
            file=sys.stderr,
        )
    return known


def _command(commands, name: str, what: str, named: bool = True) -> Parser:
    added = commands.add_parser(name, help=what, description=what)
    if named:
        added.add_argument("name", metavar="NAME", type=_matching(NAME, "a name such as my-tpu-1"))
    zone = "a zone such as us-central1-a" + ("" if named else ", or - for all")
    pattern = PLACE if named else f"-|{PLACE}"
    added.add_argument("--zone", required=True, type=_matching(pattern, zone), help=zone)
    project = "the id of a Google Cloud project"
    added.add_argument("--project", required=True, type=_matching(PLACE, project), help=project)
    added.add_argument("--dry_run", action="store_true", help="show the requests, send none")
    return added


def _slice_flags(added: Parser) -> None:
    added.add_argument(
        "--accelerator_type",
        required=True,
        type=_matching(r"[\w.-]+", "a type such as v3-32"),
        help="such as v3-32, v4-8, v5litepod-16",
    )
    added.add_argument(
        "--version", required=True, type=_matching(r"[\w.-]+", VERSION_HELP), help=VERSION_HELP
    )
    added.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    added.add_argument("--queued", action="store_true", help="wait in line, as a queued resource")
    added.add_argument("--network", default="", help="the project's default network by default")
    added.add_argument("--subnetwork", default="")
    added.add_argument(
        "--internal_ips", action="store_true", help="no addresses outside the network"
    )
    added.add_argument("--service_account", default="", help="e-mail address")
    added.add_argument("--labels", default={}, type=_pairs(LABEL), help="KEY=VALUE,...")
    added.add_argument("--metadata", default={}, type=_pairs(".*"), help="KEY=VALUE,...")
    added.add_argument(
        "--startup_script", type=_file, help="file that each machine runs when it boots"
    )


def _supervise_flags(added: Parser) -> None:
    added.add_argument(
        "--budget_hours",
        required=True,
        type=_positive,
        help="for which slices may exist, all of them together",
    )
    added.add_argument("--budget_money", type=_positive, help="limits the hours by the price too")
    added.add_argument("--max_recreations", type=_count, default=MAX_RECREATIONS)
    added.add_argument("--setup", default="", help="command for all workers of each new slice")
    added.add_argument("--price_per_chip_hour", type=_positive, help="to tell what the run cost")
    added.add_argument("--state_file", help="NAME.tpu.json by default")
    added.add_argument(
        "--adopt",
        action="store_true",
        help="a slice of this name that is there already may be deleted and made anew",
    )
    added.add_argument("--keep", action="store_true", help="leave the slice when the run is over")
    _ssh(added)
    _timeout(added, SUPERVISE_WAIT_SECONDS, "until a slice that was asked for must be ready")


def _ssh(added: Parser) -> None:
    added.add_argument(
        "--ssh_command",
        default=SSH,
        help="with {worker} {command} {name} {zone} {project} in it; "
        f"default: {SSH}".replace("%", "%%"),
    )


def _timeout(added: Parser, seconds: float, what: str) -> None:
    added.add_argument(
        "--timeout",
        type=_positive,
        default=seconds,
        help=f"seconds {what}; {seconds:.0f} by default",
    )


def _matching(pattern: str, expected: str):
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"expected {expected}. Received: {text!r}")
        return text

    return check


def _pairs(value_pattern: str):
    def read(text: str) -> dict[str, str]:
        pairs = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals or not re.fullmatch(r"[a-zA-Z][\w-]{0,62}", key, re.ASCII):
                raise argparse.ArgumentTypeError("expected KEY=VALUE,... with a word as each KEY")
            if not re.fullmatch(value_pattern, value, re.ASCII | re.DOTALL):
                raise argparse.ArgumentTypeError(f"expected a value of a-z 0-9 _ - for {key}")
            pairs[key] = value
        return pairs

    return read


def _file(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a file of text. Received: {error}") from None


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"expected a number above 0. Received: {text!r}")
    return number


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected a number from 0. Received: {text!r}")
    return int(text)
