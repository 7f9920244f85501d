"""The files of a run: `config.json`, `metrics.jsonl`, `summary.json` and where the others stand."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from pretraining import files
from pretraining.config import Config
from pretraining.errors import InputError

VERSIONS = ("tensorflow", "tensorflow-text", "tf-models-official", "tf-keras", "numpy")
# What a checkpoint must agree on to be evaluated, whatever its training was.
EVAL_IDENTITY = ("model", "vocab_file", "max_seq_length", "max_predictions_per_seq")


class RunDirectory:
    """The folder that `--output_dir` names, local or gs://.

    Attributes:
      path: the folder, without a slash at its end.
    """

    def __init__(self, path: str):
        self.path = path.rstrip("/") or "/"

    def join(self, name: str) -> str:
        """Returns the path of a file in the folder."""
        return f"{self.path}/{name}"

    def create(self) -> None:
        """Makes the folder and proves that files in it can be written, read, listed and deleted.

        Raises:
          InputError: they cannot.
        """
        probe, done = self.join(".write_test"), "written"
        try:
            files.make_folder(self.path)
            with tf.io.gfile.GFile(probe, "w") as file:
                file.write("x")
            done = "read"
            with tf.io.gfile.GFile(probe) as file:
                file.read()
            done = "listed"
            tf.io.gfile.glob(self.join("*"))
            done = "deleted"
            tf.io.gfile.remove(probe)
        except tf.errors.OpError as error:
            raise InputError(
                f"--output_dir={self.path}: expected a folder that can be written to. "
                f"Received: one in which files {files.why(error, probe, done)}"
            ) from None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns the content of a JSON file of the run, None where there is none.

        Raises:
          InputError: the file is there and is no JSON, or cannot be read.
        """
        content = files.read(self.join(name), "--output_dir")
        if content is None:
            return None
        try:
            values = json.loads(content)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise InputError(
                f"--output_dir={self.path}: expected a JSON object in {name}. Received: something else"
            )
        return values

    def read_config(self) -> dict[str, Any] | None:
        """Returns `config.json`, None where there is none.

        Raises:
          InputError: the file is there and is no configuration.
        """
        values = self.read_json("config.json")
        if values is not None and not all(
            isinstance(values.get(name), dict) for name in ("flags", "identity")
        ):
            raise InputError(
                f"--output_dir={self.path}: expected flags and identity in config.json. Received: "
                "something else"
            )
        return values

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes a JSON file so that it is whole or not there."""
        with writing(self.join(name)):
            files.write(self.join(name), json.dumps(values, indent=2) + "\n")

    def remove(self, name: str) -> None:
        """Removes a file of the run."""
        with writing(self.join(name)):
            tf.io.gfile.remove(self.join(name))

    def check_identity(self, identity: dict[str, Any], mode: str) -> None:
        """Refuses to go on with a run that was another one.

        Args:
          identity: what makes the run what it is, by flag.
          mode: as the flag.

        Raises:
          InputError: the folder holds a run of another identity; lists what differs.
        """
        before = self.read_config()
        if before is None:
            return
        then = before["identity"]
        names = EVAL_IDENTITY if mode == "eval" else tuple({**then, **identity})
        if mode == "eval" and isinstance(then.get("num_train_steps"), list):
            names = (*names, "num_train_steps")  # which phase a checkpoint is of
        now = json.loads(json.dumps(identity))
        changed = [
            f"--{name} {_difference(name, then.get(name), now.get(name))}"
            for name in names
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise InputError(
                f"--output_dir={self.path}: holds another run: {'; '.join(changed)}. "
                "Expected the flags of that run, or another --output_dir"
            )

    def write_config(self, config: Config, identity: dict[str, Any], facts: dict[str, Any]) -> None:
        """Writes `config.json`: flags, identity, what was worked out from them, and versions."""
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        self.write_json(
            "config.json",
            {
                "flags": config.as_flags(),
                "identity": identity,
                **facts,
                "versions": {"python": platform.python_version(), **versions},
            },
        )


def _difference(name: str, then: Any, now: Any) -> str:
    if name == "vocab_file":
        return "held other tokens"
    if name == "input_files":
        return "held other records"
    if isinstance(then, dict) and isinstance(now, dict):  # the dimensions of the model
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        then, now = ({key: d.get(key) for key in keys} for d in (then, now))
    return f"was {then}, is {now}"


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turns a failure to write, a full disk above all, into one line that names the file."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise InputError(
            f"--output_dir: {path} {files.why(error, path, 'written')}. "
            "What was written before is intact"
        ) from None
