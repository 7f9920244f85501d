"""What can only be tried with TensorFlow: that it starts, that a TPU computes, what a bucket allows.

Each trial is a process of its own (`python -m tpu.trials KIND ARGUMENTS`): TensorFlow may crash, hold
Python's lock while it waits, and keep a TPU until its process ends. The last line that it prints is
the result, as JSON.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable

from tpu import local_tpu
from tpu.failures import SHOWN_CHARACTERS, Fault

# What each step needs.
_RIGHTS = {
    "written to": "storage.objects.create",
    "listed": "storage.objects.list",
    "overwritten in": "storage.objects.create and storage.objects.delete",
    "read": "storage.objects.get",
    "deleted from": "storage.objects.delete",
}


def start() -> str:
    """Returns a line about TensorFlow and its devices, if it can be imported."""
    import tensorflow as tf

    kinds = [device.device_type for device in tf.config.list_physical_devices()]
    devices = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{tf.__version__} starts and sees {devices}"


def device(tpu: str, zone: str, project: str) -> str:
    """Returns a line about a TPU that has computed something.

    Raises:
      Fault: it cannot be used.
    """
    import tensorflow as tf

    from tpu.strategy import DeviceError, create_strategy, describe

    try:
        strategy = create_strategy(tpu, zone, project)
    except DeviceError as error:
        what, separator, remedy = str(error).partition(". ")
        raise Fault(what, remedy if separator else "") from None

    @tf.function
    def count() -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(lambda: tf.constant(1.0)), axis=None)

    if (counted := int(count())) != strategy.num_replicas_in_sync:
        raise Fault(
            f"expected the sum of a one from each of {strategy.num_replicas_in_sync} replicas. "
            f"Received: {counted}",
            "Remedy: delete the TPU and create it again",
        )
    return f"{describe(strategy)} compute"


def bucket(path: str) -> str:
    """Writes, lists, reads, overwrites and deletes a small object, as saves of a run do.

    Args:
      path: gs://bucket or a folder in it; nothing there is touched but a new name.

    Raises:
      Fault: a right is missing; the text names it.
    """
    import tensorflow as tf

    name = f"lamb-tf-doctor-{secrets.token_hex(8)}"
    folder, text = f"{path.rstrip('/')}/{name}", secrets.token_hex(32)
    file = f"{folder}/object"
    steps: list[tuple[str, Callable[[], object]]] = [  # as in _RIGHTS
        ("written to", lambda: _write(file, "")),
        ("listed", lambda: _expect("listed", tf.io.gfile.listdir(folder), ["object"])),
        ("overwritten in", lambda: _write(file, text)),
        ("read", lambda: _expect("read", _read(file), text)),
        ("deleted from", lambda: tf.io.gfile.remove(file)),
    ]
    is_there = False
    for step, act in steps:
        try:
            act()
        except (tf.errors.OpError, Fault) as error:
            left = f" {file} is left behind." if is_there and not _removed(file) else ""
            raise _bucket_fault(path, step, error, left) from None
        is_there = True
    return f"{path} can be {', '.join(step for step, _ in steps[:-1])} and {steps[-1][0]}"


def _write(file: str, text: str) -> None:
    import tensorflow as tf

    with tf.io.gfile.GFile(file, "w") as opened:
        opened.write(text)


def _read(file: str) -> str:
    import tensorflow as tf

    with tf.io.gfile.GFile(file) as opened:
        return opened.read()


def _expect(step: str, found: object, expected: object) -> None:
    if found != expected:
        raise Fault(f"expected what was written to be {step}. Received: {found!r}", "")


def _removed(file: str) -> bool:
    import tensorflow as tf

    with contextlib.suppress(tf.errors.OpError):
        tf.io.gfile.remove(file)
        return True
    return False


def _bucket_fault(path: str, step: str, error: Exception, left: str) -> Fault:
    """Returns what to say of a step that failed, by the kind of TensorFlow's error and its text."""
    import tensorflow as tf

    text = " ".join(str(error).split())
    bucket_path = "/".join(path.split("/")[:3])
    what = f"{path} cannot be {step} ({type(error).__name__}: {text[:300]}).{left}".rstrip(".")
    grant = (
        f"`gcloud storage buckets add-iam-policy-binding {bucket_path} --member=... "
        f"--role=roles/storage.objectAdmin`, which holds {_RIGHTS[step]}"
    )
    if isinstance(error, tf.errors.UnauthenticatedError) or "nonymous caller" in text:
        return Fault(what, f"Remedy: `gcloud auth application-default login`, or {grant}")
    if isinstance(error, tf.errors.NotFoundError) and step == "written to":
        made = f"`gcloud storage buckets create {bucket_path} --location=...`, where the TPU is"
        return Fault(what, f"Remedy: check the name, or {made}")
    # TensorFlow calls what it may not list, not found.
    if isinstance(error, tf.errors.PermissionDeniedError | tf.errors.NotFoundError):
        return Fault(what, f"Remedy: {grant}")
    return Fault(
        what,
        "Tried: Google Cloud Storage. Check: that this machine reaches it (`gcloud storage ls "
        f"{bucket_path}`), and {grant}",
    )


def trial(seconds: float, *arguments: str) -> str:
    """Makes a trial of `tpu.trials` in a process of its own.

    Args:
      seconds: after which it is given up.
      *arguments: kind of the trial and its own arguments.

    Raises:
      Fault: what is wrong, also where the process crashed or gave no answer.
    """
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    if not local_tpu.metadata_host():
        environment["NO_GCE_CHECK"] = "true"  # TensorFlow would ask for it for a minute
    command = [sys.executable, "-m", "tpu.trials", *arguments]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise Fault(
            f"no answer within {seconds:.0f} s", f"Check: `{' '.join(command[1:])}` by hand"
        ) from None
    return read_result(done.returncode, done.stdout, done.stderr)


def read_result(status: int, output: str, errors: str) -> str:
    """Returns what a trial has found; raises it as a `Fault` where it is not good."""
    try:
        result = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        lines = [line for line in errors.splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        last = told.removeprefix("error: ") or (
            lines[-1][:SHOWN_CHARACTERS] if lines else "no message"
        )
        raise Fault(
            f"its process ended with status {status}: {last}", "see the lines above"
        ) from None
    if "ok" not in result:
        raise Fault(result["what"], result["remedy"] or "see the lines above")
    return result["ok"]


TRIALS: dict[str, Callable[..., str]] = {"start": start, "device": device, "bucket": bucket}


def main(argv: list[str]) -> int:
    """Makes one trial and prints its result as a line of JSON."""
    try:
        result = {"ok": TRIALS[argv[0]](*argv[1:])}
    except Fault as fault:
        result = {"what": fault.what, "remedy": fault.remedy}
    except Exception as error:  # whatever is wrong, it is what was looked for
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result = {"what": text[:300], "remedy": ""}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
