"""Logs of JSON lines, an object a step, in which each step stands once however a run was killed.

On a local disk every line is appended and flushed. To append to an object on gs:// is to upload all
of it anew, so lines gather there in parts, `<path>.parts/<first step>.jsonl`. The last part is
uploaded again as it grows, and the whole is joined into `<path>` when the log is closed or opened
anew. A step that is in a part and, after a kill, already in the whole counts once.
"""

import json
import math
import time
from typing import Any

import tensorflow as tf

from pretraining import files
from pretraining.errors import InputError
from pretraining.run_directory import writing

UPLOAD_SECONDS = 30.0  # between two uploads of a part, at least
PART_BYTES = 8 << 20  # a part that has grown to this is left alone, and the next one begun


class MetricsLog:
    """A file of JSON lines, {"step": step, **values}, in ascending order of the steps.

    Attributes:
      last: the values that were written last, without their step.
    """

    def __init__(self, path: str, start_step: int):
        """Opens the log and drops what an earlier start wrote beyond `start_step`.

        Args:
          path: local or gs://.
          start_step: the step from which the run goes on.

        Raises:
          InputError: the log cannot be read or written.
        """
        self._path = path
        records = [record for record in read(path) if record["step"] <= start_step]
        last = dict(records[-1]) if records else {"step": -1}
        self._last_step: int = last.pop("step")
        self.last: dict[str, Any] = last
        with writing(path):
            _settle(path, records)
            self._lines = _Parts(path) if files.on_gcs(path) else _Appended(path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends the values of a step; a step that stands already stays as it is.

        Args:
          step: the global step, from 0.
          values: numbers, text, lists of them or NumPy arrays; NaN and infinity become null.

        Raises:
          InputError: the line cannot be written.
        """
        if step <= self._last_step:
            return
        self.last = _valid(values)
        self._last_step = step
        with writing(self._path):
            self._lines.append(step, _line({"step": step, **self.last}))

    def flush(self) -> None:
        """Puts all lines where a kill leaves them; due before each checkpoint.

        Raises:
          InputError: they cannot be written.
        """
        with writing(self._path):
            self._lines.flush()

    def close(self) -> None:
        """Closes the log; on gs:// joins its parts.

        Raises:
          InputError: a line cannot be written.
        """
        with writing(self._path):
            self._lines.close()


def read(path: str) -> list[dict[str, Any]]:
    """Returns the objects of a log, also of one that a kill has left in parts.

    Args:
      path: that of the log, local or gs://.

    Returns:
      One object a step, in ascending order. Lines that are torn or damaged are left out.

    Raises:
      InputError: the storage does not let us read it.
    """
    found: dict[int, dict[str, Any]] = {}
    for source in [path, *_parts_of(path)]:
        for line in (files.read(source, "--output_dir") or b"").split(b"\n"):
            record = _parsed(line)
            if record is not None:
                found.setdefault(record["step"], record)
    return [found[step] for step in sorted(found)]


class _Appended:
    """A local file: appended to line by line."""

    def __init__(self, path: str):
        self._file = tf.io.gfile.GFile(path, "a")

    def append(self, step: int, line: str) -> None:
        del step
        self._file.write(line)
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Parts:
    """An object on gs://: written in parts, joined at the end."""

    def __init__(self, path: str):
        self._path = path
        self._part = ""  # path of the part that grows
        self._text: list[str] = []  # its lines
        self._waiting = False  # whether some of them are not uploaded
        self._uploaded = time.monotonic()

    def append(self, step: int, line: str) -> None:
        self._part = self._part or f"{self._path}.parts/{step:010d}.jsonl"
        self._text.append(line)
        self._waiting = True
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        text = "".join(self._text)
        files.write(self._part, text)
        self._waiting, self._uploaded = False, time.monotonic()
        if len(text) >= PART_BYTES:
            self._part, self._text = "", []

    def close(self) -> None:
        self.flush()
        _settle(self._path, read(self._path))
        self._part, self._text = "", []


def _parts_of(path: str) -> list[str]:
    try:
        return sorted(tf.io.gfile.glob(f"{path}.parts/*.jsonl"))
    except tf.errors.NotFoundError:
        return []
    except tf.errors.OpError as error:
        raise InputError(f"--output_dir={path}: {files.why(error, path, 'listed')}") from None


def _settle(path: str, records: list[dict[str, Any]]) -> None:
    """Makes a log hold these records and no others, all in one file.

    Whatever part of it a kill lets happen, no record is lost: the parts go after the whole stands.
    """
    text = "".join(map(_line, records))
    if files.read(path, "--output_dir") != text.encode():
        files.write(path, text)
    for part in _parts_of(path):
        tf.io.gfile.remove(part)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line; None for a torn or damaged one."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(step := record.get("step")) is not int or step < 0:
        return None
    return _valid(record)


def _valid(value: Any) -> Any:
    """What JSON can hold of a value: null in the place of NaN and infinity, lists for arrays."""
    if isinstance(value, dict):
        return {key: _valid(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_valid(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
