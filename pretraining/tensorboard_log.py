"""TensorBoard's event files of a run, in which each step stands once however a run was killed.

TensorFlow's summary writer keeps silent where the disk is full and uploads a whole file at each flush
to gs://. So the events are written here, as it would write them, with TensorFlow's record writer,
which raises. On gs:// each file is an object that is uploaded again while it is small.
"""

import itertools
import os
import platform
import time
from collections.abc import Iterator

import tensorflow as tf
from google.protobuf.message import DecodeError

from pretraining import files
from pretraining.errors import InputError
from pretraining.run_directory import writing

FLUSH_SECONDS = 30.0  # between two writes, at least
PART_BYTES = 8 << 20  # an object on gs:// that has grown to this is left alone, a new one begun

Event, Summary = tf.compat.v1.Event, tf.compat.v1.Summary
METADATA = tf.compat.v1.SummaryMetadata(
    plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
)
UNFINISHED = ".unfinished"
_numbers = itertools.count()  # of the files of this process


class TensorBoardLog:
    """The event files of a folder: curves of numbers, by step."""

    def __init__(self, folder: str, start_step: int):
        """Opens the folder and drops the events of an earlier start beyond `start_step`.

        Files in which there is nothing to drop stay as they are.

        Args:
          folder: local or gs://.
          start_step: the step from which the run goes on.

        Raises:
          InputError: the folder or a file in it cannot be read or written.
        """
        self._folder = folder.rstrip("/")
        self._last: dict[str, int] = {}  # the newest step of each tag
        with writing(self._folder):
            files.make_folder(self._folder)
            _remove_unfinished(self._folder)
            for path in _event_files(self._folder):
                _cut(path, start_step, self._last)
        self._waiting: list[bytes] = []  # events that are not written
        self._written: list[bytes] = []  # the other ones of an object on gs://
        self._path = ""
        self._writer: tf.io.TFRecordWriter | None = None
        self._flushed = time.monotonic()

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Adds points to curves; a step that a curve has already stays as it is.

        Args:
          step: the global step.
          values: by tag, such as "trust_ratio/layer_0/kernel". None is left out.

        Raises:
          InputError: the events cannot be written.
        """
        summary = Summary()
        for tag, value in values.items():
            if value is not None and step > self._last.get(tag, -1):
                point = summary.value.add(tag=tag, metadata=METADATA)
                point.tensor.dtype = tf.float32.as_datatype_enum
                point.tensor.tensor_shape.SetInParent()  # no dimensions: a scalar
                point.tensor.float_val.append(float(value))
                self._last[tag] = step
        if summary.value:
            event = Event(wall_time=time.time(), step=step, summary=summary)
            self._waiting.append(event.SerializeToString())
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Puts all events where a kill leaves them; due before each checkpoint.

        Raises:
          InputError: they cannot be written.
        """
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        with writing(self._folder):
            if not self._path:
                self._path = f"{self._folder}/{_new_name()}"
                self._waiting.insert(0, _version())
            if files.on_gcs(self._folder):
                self._upload()
            else:
                self._append()

    def close(self) -> None:
        """Writes what is not yet written.

        Raises:
          InputError: it cannot be written.
        """
        self.flush()
        if self._writer is not None:
            with writing(self._folder):
                self._writer.close()
        self._writer, self._path, self._written = None, "", []

    def _append(self) -> None:
        self._writer = self._writer or tf.io.TFRecordWriter(self._path)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self._writer.write(event)
        self._writer.flush()

    def _upload(self) -> None:
        self._written += self._waiting
        self._waiting = []
        _write(self._path, self._written)
        if sum(map(len, self._written)) >= PART_BYTES:
            self._path, self._written = "", []


def _new_name() -> str:
    """As TensorFlow calls them: in the order of the names is in the order of time."""
    host = platform.node() or "localhost"
    return (
        f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}.{next(_numbers):04d}.v2"
    )


def _version() -> bytes:
    return Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()


def _event_files(folder: str) -> list[str]:
    return sorted(tf.io.gfile.glob(f"{folder}/*tfevents*"))


def _remove_unfinished(folder: str) -> None:
    path = f"{folder}/{UNFINISHED}"
    if not files.on_gcs(path) and tf.io.gfile.exists(path):
        tf.io.gfile.remove(path)


def _events(path: str) -> Iterator[tuple[bytes, Event]]:
    """Yields the events of a file up to where it is torn or damaged, as TensorBoard does."""
    try:
        for content in tf.data.TFRecordDataset(path).as_numpy_iterator():
            try:
                yield content, Event.FromString(content)
            except DecodeError:
                yield content, Event()
    except tf.errors.DataLossError:
        return
    except tf.errors.OpError as error:
        raise InputError(f"--output_dir={path}: {files.why(error, path, 'read')}") from None


def _cut(path: str, start_step: int, last: dict[str, int]) -> None:
    """Drops the events of a file beyond a step; notes the newest step of each tag of the others."""
    goes_beyond = False
    for _, event in _events(path):
        if event.step > start_step:
            goes_beyond = True
        else:
            for value in event.summary.value:
                last[value.tag] = max(event.step, last.get(value.tag, -1))
    if not goes_beyond:
        return
    kept = [
        (content, event.HasField("file_version"))
        for content, event in _events(path)
        if event.step <= start_step
    ]
    if all(is_version for _, is_version in kept):
        tf.io.gfile.remove(path)
    else:
        _write(path, [content for content, _ in kept])


def _write(path: str, events: list[bytes]) -> None:
    """Writes an event file so that it is whole or not there, whenever the process ends."""
    # TensorBoard takes whatever has "tfevents" in its name for a file of events.
    unfinished = path if files.on_gcs(path) else f"{path.rpartition('/')[0]}/{UNFINISHED}"
    with tf.io.TFRecordWriter(unfinished) as writer:
        for event in events:
            writer.write(event)
    if unfinished != path:
        tf.io.gfile.rename(unfinished, path, overwrite=True)
