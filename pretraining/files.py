"""Files that flags name, local or gs://, and what to say where one cannot be read or written."""

import fnmatch
import re

import tensorflow as tf

from pretraining.errors import InputError

# What Cloud Storage calls the right to do a thing with the objects of a bucket.
PERMISSIONS = {
    "read": "storage.objects.get",
    "listed": "storage.objects.list",
    "written": "storage.objects.create",
    "deleted": "storage.objects.delete",
}


def find_files(
    patterns: str, flag: str, in_folder: str = "*.tfrecord*", recursive: bool = False
) -> list[str]:
    """Lists the files that a flag names.

    Args:
      patterns: comma-separated files, globs or folders.
      flag: named in the error messages.
      in_folder: a folder stands for its files of this pattern; hidden ones are left out.
      recursive: whether the files in its folders count as well.

    Returns:
      The paths in ascending order, each once.

    Raises:
      InputError: a pattern matches nothing.
    """
    found: set[str] = set()
    # A file whose name holds a comma, a bracket or a star is found by that name.
    literal = is_file(patterns, flag)
    for pattern in [patterns] if literal else filter(None, map(str.strip, patterns.split(","))):
        try:
            folder = tf.io.gfile.isdir(pattern)
            if is_file(pattern, flag):
                files = [pattern]
            elif folder:
                files = _files_in(pattern.rstrip("/"), in_folder, recursive)
            else:
                files = [path for path in tf.io.gfile.glob(pattern) if is_file(path, flag)]
        except tf.errors.OpError as error:
            raise InputError(f"{flag}={pattern}: {why(error, pattern, 'listed')}") from None
        if not files:
            what = f"{in_folder} files in this folder" if folder else "a file, glob or folder"
            raise InputError(f"{flag}={pattern}: expected {what}. Received: no file matches")
        found.update(files)
    if not found:
        raise InputError(f"{flag}={patterns}: expected files, globs or folders")
    return sorted(found)


def _files_in(folder: str, pattern: str, recursive: bool) -> list[str]:
    if not recursive:
        names = tf.io.gfile.listdir(folder)
        return [f"{folder}/{name}" for name in fnmatch.filter(names, pattern) if name[0] != "."]
    return [
        f"{parent.rstrip('/')}/{name}"
        for parent, _, names in tf.io.gfile.walk(folder)
        for name in fnmatch.filter(names, pattern)
        if name[0] != "."
    ]


def is_file(path: str, flag: str) -> bool:
    """Tells whether a path is that of a file.

    Raises:
      InputError: the storage does not let us look.
    """
    try:
        return tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path)
    except tf.errors.OpError as error:
        raise InputError(f"{flag}={path}: {why(error, path, 'read')}") from None


def why(error: tf.errors.OpError, path: str, done: str) -> str:
    """Says in a line why a path could not be read, listed, written or deleted.

    Args:
      error: what TensorFlow raised.
      path: local or gs://.
      done: "read", "listed", "written" or "deleted".
    """
    cause = " ".join(str(error.message).split())[:200]
    bucket = re.match(r"gs://([^/]+)", path)
    if bucket and isinstance(
        error, tf.errors.PermissionDeniedError | tf.errors.UnauthenticatedError
    ):
        return (
            f"cannot be {done}: these credentials lack the permission {PERMISSIONS[done]} on the "
            f"bucket {bucket[1]} ({cause})"
        )
    if bucket and isinstance(error, tf.errors.NotFoundError):
        return f"cannot be {done}: no such object in the bucket {bucket[1]}, or no such bucket ({cause})"
    return f"cannot be {done} ({cause})"
