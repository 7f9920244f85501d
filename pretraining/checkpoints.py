"""Checkpoints that can be trusted: complete or invisible, and checked when they are read.

`tf.train.CheckpointManager` is no base for this: it believes whatever the file `checkpoint` names,
fails where that file is empty, keeps by time and not by step, and counts its saves in the
checkpoint, which would then differ after a stop. TensorFlow renames the data when they are whole,
but writes the index, which makes a checkpoint visible, in its place: a kill leaves half of one. So
all is written in a folder of its own, checked, and renamed, the index last. On gs:// an object is
there when it is whole, and to rename is to copy: there TensorFlow writes in place, the index last.
"""

import contextlib
import errno
import os
import re
from typing import NoReturn

import tensorflow as tf

from pretraining import console, files
from pretraining.errors import InputError
from pretraining.run_directory import writing

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# What is left when a save is cut off.
UNFINISHED = re.compile(r"ckpt-\d+(_temp/?|\..*\.tempstate\d+)|checkpoint\.(tmp\w+|unfinished)")
# Errors that say nothing about the content of a checkpoint.
NOT_DAMAGE = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnauthenticatedError,
    tf.errors.UnavailableError,
)


class _Damaged(Exception):
    """A checkpoint cannot be read; the text says why."""


class Checkpoints:
    """The checkpoints of a run, `ckpt-<step>` in one folder.

    Args:
      folder: local or gs://, made when it is first needed.
      state: what is saved and restored; its variables are all built.
      keep: how many of the newest are kept.
      keep_every_steps: those of a multiple of so many steps are kept as well; 0: none.
    """

    def __init__(
        self, folder: str, state: tf.train.Checkpoint, *, keep: int, keep_every_steps: int = 0
    ):
        self._folder = folder.rstrip("/")
        self._state = state
        self._keep = max(keep, 1)
        self._keep_every_steps = keep_every_steps
        self._current: int | None = None  # the step that was restored or saved last
        self._damaged: set[int] = set()

    @property
    def newest(self) -> str | None:
        """The checkpoint that was restored or saved last; before that, the last in the folder.

        Raises:
          InputError: the folder cannot be listed.
        """
        if self._current is not None:
            return self._path(self._current)
        steps = _steps(self._names())
        return self._path(max(steps)) if steps else None

    def restore(self, *, read_only: bool = False) -> str | None:
        """Restores the newest checkpoint that is whole, and lets the file `checkpoint` name it.

        TensorFlow checks the CRC of all that it reads, and reads everything before it assigns.

        Args:
          read_only: leave the folder as it is; another run may be at work there.

        Returns:
          Its path, None where there are no checkpoints.

        Raises:
          InputError: there are some and none can be read; or the newest is that of another
            model or optimizer, or the storage does not let us read it.
        """
        self._damaged.clear()
        # Listed anew each time: a run that is at work there may have deleted what was seen.
        while steps := _steps(self._names()) - self._damaged:
            step = max(steps)
            try:
                self._read(self._path(step), f"--output_dir={self._folder}")
            except _Damaged as damage:
                self._damaged.add(step)
                console.say(f"{self._path(step)} is damaged ({damage}). Trying the one before")
                continue
            self._current = step
            if not read_only:
                with writing(self._folder):
                    self._record(_steps(self._names()))
            return self._path(step)
        if self._damaged:
            raise InputError(
                f"--output_dir={self._folder}: expected a checkpoint that can be read. Received: only "
                f"damaged ones, of step {', '.join(map(str, sorted(self._damaged)))}"
            )
        return None

    def restore_from(self, path: str, flag: str) -> None:
        """Restores a checkpoint that a flag names; the folder has no part in it.

        Args:
          path: with or without `.index` at its end.
          flag: "--eval_checkpoint", say, for the messages.

        Raises:
          InputError: it is not there, or damaged, or that of another model.
        """
        path = path.removesuffix(".index")
        if not files.is_file(f"{path}.index", flag):
            raise InputError(
                f"{flag}={path}: expected a checkpoint, a path that ends in ckpt-<step>. Received: none "
                "there"
            )
        try:
            self._read(path, f"{flag}={path}")
        except _Damaged as damage:
            raise InputError(
                f"{flag}={path}: expected a checkpoint that is whole. Received: one that cannot be "
                f"read ({damage})"
            ) from None

    def save(self, step: int) -> str:
        """Saves the state, unless that step was saved or restored last; deletes the superfluous.

        Args:
          step: updates made so far; names the checkpoint, whose path is returned.

        Raises:
          InputError: it cannot be written; the others are intact.
        """
        if step == self._current:
            return self._path(step)
        with writing(self._folder):
            files.make_folder(self._folder)
            self._remove_unfinished()  # first, since a disk may be full of it
            try:
                self._write(step)
            except BaseException:
                with contextlib.suppress(tf.errors.OpError):
                    self._remove_unfinished()
                raise
            self._current = step
            self._damaged.discard(step)
            names = self._names()
            superfluous = self._superfluous(_steps(names))
            self._record(_steps(names) - superfluous)
            for old in superfluous:
                self._remove(old, names)
        return self._path(step)

    def _path(self, step: int) -> str:
        return f"{self._folder}/ckpt-{step}"

    def _names(self) -> list[str]:
        try:
            return tf.io.gfile.listdir(self._folder)
        except tf.errors.NotFoundError:
            return []
        except tf.errors.OpError as error:
            why = files.why(error, self._folder, "listed")
            raise InputError(f"--output_dir: {self._folder} {why}") from None

    def _read(self, path: str, given: str) -> None:
        try:
            # Without it TensorFlow would take the file for one of its first version.
            tf.train.load_checkpoint(path).get_tensor(GRAPH)
            # Not `restore`, which would add a counter of saves to the state.
            self._state.read(path).assert_existing_objects_matched()
        except MemoryError:
            raise
        except Exception as error:  # OpError, IndexError, RuntimeError and others
            _explain(error, path, given)

    def _write(self, step: int) -> None:
        path = self._path(step)
        if files.on_gcs(path):
            self._remove(step, self._names())
            try:
                _check_written(self._state.write(path))
            except OSError:
                self._remove(step, [])
                raise
            return
        folder = f"{path}_temp"
        _check_written(self._state.write(f"{folder}/ckpt-{step}"))
        names = tf.io.gfile.listdir(folder)
        for name in names:
            _sync(f"{folder}/{name}")
        self._remove(step, self._names())  # a damaged one, of which no part may stay
        for name in sorted(names):  # .data before .index, which makes it visible
            tf.io.gfile.rename(f"{folder}/{name}", f"{self._folder}/{name}")
        _sync(self._folder)
        tf.io.gfile.rmtree(folder)

    def _record(self, steps: set[int]) -> None:
        """Lets the file `checkpoint`, if it does not yet, name the current one as the newest."""
        kept = sorted(step for step in steps - self._damaged if step <= self._current)
        lines = [f'model_checkpoint_path: "ckpt-{self._current}"\n']
        lines += [f'all_model_checkpoint_paths: "ckpt-{step}"\n' for step in kept]
        path = f"{self._folder}/checkpoint"
        if files.read(path, "--output_dir") != "".join(lines).encode():
            files.write(path, "".join(lines))

    def _superfluous(self, steps: set[int]) -> set[int]:
        """Those before the current one that need not be kept; damaged ones do not count."""
        before = sorted(step for step in steps if step < self._current)
        good = [step for step in before if step not in self._damaged]
        kept = set(good[max(len(good) + 1 - self._keep, 0) :])
        if self._keep_every_steps:
            kept.update(step for step in good if step % self._keep_every_steps == 0)
        return set(before) - kept

    def _remove(self, step: int, names: list[str]) -> None:
        """Deletes a checkpoint, its index first: what is left of it cannot be seen."""
        index = f"ckpt-{step}.index"
        for name in [index] + [n for n in names if n.startswith(f"ckpt-{step}.data-")]:
            with contextlib.suppress(tf.errors.NotFoundError):
                tf.io.gfile.remove(f"{self._folder}/{name}")

    def _remove_unfinished(self) -> None:
        names = self._names()
        whole = _steps(names)
        for name in names:
            data = re.fullmatch(r"ckpt-(\d+)\.data-.*", name)
            if UNFINISHED.fullmatch(name) or (data and int(data[1]) not in whole):
                remove = tf.io.gfile.rmtree if "_temp" in name else tf.io.gfile.remove
                with contextlib.suppress(tf.errors.NotFoundError):
                    remove(f"{self._folder}/{name.rstrip('/')}")


def _steps(names: list[str]) -> set[int]:
    return {int(m[1]) for name in names if (m := re.fullmatch(r"ckpt-(\d+)\.index", name))}


def _explain(error: Exception, path: str, given: str) -> NoReturn:
    """Tells damage from a checkpoint of something else and from a storage that refuses."""
    message = " ".join((getattr(error, "message", None) or str(error)).split())
    cause = re.sub(r"^\{\{.*?\}\} ?", "", message)[:200]
    # ValueError: a shape differs. AssertionError: a variable is not in the checkpoint.
    if isinstance(error, (AssertionError, ValueError)) or "original dtype" in message:
        cause = cause.split(", likely due to")[0]
        raise InputError(
            f"{given}: expected a checkpoint of this model and optimizer. Received: {path}, which is "
            f"that of another ({cause})"
        ) from None
    if re.search("HTTP response code 40[13]", message):  # the reader's own errors have no class
        error = tf.errors.PermissionDeniedError(None, None, message)
    refused = "HTTP request" in message and "HTTP response code 404" not in message
    if refused or isinstance(error, NOT_DAMAGE):
        why = files.why(error, path, "read")
        raise InputError(f"{given}: {path} {why}") from None
    raise _Damaged(cause or type(error).__name__) from None


def _check_written(path: str) -> None:
    """Reads back the index, the size of the data, and the array that was written last.

    Raises:
      OSError: they are not what was written.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        reader.get_tensor(GRAPH)
        types = reader.get_variable_to_dtype_map()
        expected = sum(
            tf.TensorShape(shape).num_elements() * types[name].size
            for name, shape in reader.get_variable_to_shape_map().items()
            if types[name] != tf.string
        )
        folder, name = path.rsplit("/", 1)
        parts = [n for n in tf.io.gfile.listdir(folder) if n.startswith(f"{name}.data-")]
        written = sum(tf.io.gfile.stat(f"{folder}/{part}").length for part in parts)
    except (IndexError, RuntimeError) as error:  # the reader's own, beside OpError
        raise OSError(f"what was written cannot be read: {error}") from None
    if written < expected:
        raise OSError(f"{written} of at least {expected} bytes were written")


def _sync(path: str) -> None:
    """Waits until a local file, or the names in a folder, will outlive the machine's power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without
            raise
    finally:
        os.close(descriptor)
