"""Files that flags name, local or gs://, and what to say where one cannot be read or written."""

import contextlib
import fnmatch
import posixpath
import re
from collections.abc import Iterator

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
      InputError: a pattern matches nothing, or the storage does not let us look.
    """
    found: set[str] = set()
    # A file whose name holds a comma, a bracket or a star is found by that name.
    literal = set(",*?[") & set(patterns) and _is_literal(patterns)
    for pattern in [patterns] if literal else filter(None, map(str.strip, patterns.split(","))):
        try:
            files, folder = _matches(pattern, in_folder, recursive)
        except tf.errors.OpError as error:
            done = "listed" if set("*?[") & set(pattern) else "read"
            raise InputError(f"{flag}={pattern}: {why(error, pattern, done)}") from None
        if not files:
            what = f"{in_folder} files in this folder" if folder else "a file, glob or folder"
            raise InputError(f"{flag}={pattern}: expected {what}. Received: no file matches")
        found.update(files)
    if not found:
        raise InputError(f"{flag}={patterns}: expected files, globs or folders")
    return sorted(found)


def _matches(pattern: str, in_folder: str, recursive: bool) -> tuple[list[str], bool]:
    """Returns the files that one pattern stands for, and whether it names a folder."""
    is_glob = bool(set("*?[") & set(pattern))
    if is_bucket(pattern):  # asking what it is takes a right that reading and writing do not
        kind = "folder"
    elif is_glob and on_gcs(pattern):  # asking for an object that is not there, likewise
        kind = "file" if _is_literal(pattern) else ""
    else:
        kind = _kind(pattern)
    if kind == "file":
        return [pattern], False
    if kind == "folder":
        return _files_in(pattern.rstrip("/"), in_folder, recursive), True
    if not is_glob:
        return [], False
    if on_gcs(pattern):
        return list(_objects(pattern, recursive=False)), False
    return [path for path in tf.io.gfile.glob(pattern) if not tf.io.gfile.isdir(path)], False


def _files_in(folder: str, pattern: str, recursive: bool) -> list[str]:
    if on_gcs(folder):
        paths = _objects(f"{folder}/*", recursive)
    elif recursive:
        paths = (
            f"{parent.rstrip('/')}/{name}"
            for parent, _, names in tf.io.gfile.walk(folder)
            for name in names
        )
    else:
        here = (f"{folder}/{name}" for name in tf.io.gfile.listdir(folder))
        paths = (path for path in here if not tf.io.gfile.isdir(path))
    return [
        path
        for path in paths
        if fnmatch.fnmatch(name := posixpath.basename(path), pattern) and name[0] != "."
    ]


def _objects(pattern: str, recursive: bool) -> Iterator[str]:
    """Lists objects with a request a thousand; TensorFlow's walk makes two for each object."""
    paths = tf.io.gfile.glob(pattern)
    while paths:
        pattern += "/*"
        below = tf.io.gfile.glob(pattern)
        folders = {posixpath.dirname(path) for path in below}
        yield from (path for path in paths if path not in folders and path[-1] != "/")
        paths = below if recursive else []


def on_gcs(path: str) -> bool:
    """Tells whether a path is in Google Cloud Storage."""
    return path.startswith("gs://")


def is_bucket(path: str) -> bool:
    """Tells whether a path is that of a bucket as a whole."""
    return on_gcs(path) and "/" not in path.removeprefix("gs://").rstrip("/")


def is_file(path: str, flag: str) -> bool:
    """Tells whether a path is that of a file.

    Raises:
      InputError: the storage does not let us look.
    """
    try:
        return _kind(path) == "file"
    except tf.errors.OpError as error:
        raise InputError(f"{flag}={path}: {why(error, path, 'read')}") from None


def _kind(path: str) -> str:
    """Returns "file", "folder", or "" where there is nothing."""
    try:
        return "folder" if tf.io.gfile.stat(path).is_directory else "file"
    except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
        return ""


def _is_literal(path: str) -> bool:
    with contextlib.suppress(tf.errors.OpError):  # a list of paths is no path, say
        return _kind(path) == "file"
    return False


def read(path: str, flag: str) -> bytes | None:
    """Returns what a file holds, None where there is none.

    To go through the lines of a GFile is no way to read: where reading fails they just end.

    Raises:
      InputError: the storage does not let us read it.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()
    except tf.errors.NotFoundError:
        return None
    except tf.errors.OpError as error:
        raise InputError(f"{flag}={path}: {why(error, path, 'read')}") from None


def make_folder(path: str) -> None:
    """Makes a folder, if need be with those above it.

    Raises:
      tf.errors.OpError: it cannot be made.
    """
    if not on_gcs(path):
        tf.io.gfile.makedirs(path)
    elif not is_bucket(path):
        # TensorFlow's makedirs asks for the bucket, which takes a right that nothing else needs,
        # and never ends where there is no such bucket. Folders need no parents there.
        with contextlib.suppress(tf.errors.AlreadyExistsError):
            tf.io.gfile.mkdir(path)


def write(path: str, text: str) -> None:
    """Writes a file so that it is whole or not there, whenever the process ends.

    Raises:
      tf.errors.OpError: it cannot be written.
    """
    # An object is not there before it is whole; to rename one is to copy and to delete it.
    unfinished = path if on_gcs(path) else f"{path}.unfinished"
    with tf.io.gfile.GFile(unfinished, "w") as file:
        file.write(text)
    if unfinished != path:
        tf.io.gfile.rename(unfinished, path, overwrite=True)


def why(error: Exception, path: str, done: str) -> str:
    """Says in a line why a path could not be read, listed, written or deleted.

    Args:
      error: what TensorFlow or Python raised.
      path: local or gs://.
      done: "read", "listed", "written" or "deleted".
    """
    message = getattr(error, "message", None) or str(error)
    cause = _cause(message)
    if not on_gcs(path):
        return f"cannot be {done} ({cause})"
    bucket = path.removeprefix("gs://").split("/")[0]
    if isinstance(error, tf.errors.PermissionDeniedError):
        named = re.search(r"storage\.\w+\.\w+", message)
        permission = named[0] if named else PERMISSIONS[done]
        if "response code 401" in message:
            reason = (
                f"no valid credentials for the permission {permission} on the bucket {bucket}; "
                "gcloud auth application-default login makes some"
            )
        elif named:
            reason = f"these credentials lack the permission {permission} on the bucket {bucket}"
        else:
            reason = f"the bucket {bucket} refuses, where the permission {permission} is needed"
        if "may not exist" in message and permission == PERMISSIONS["read"]:
            reason += f", or lack {PERMISSIONS['listed']} and there is no such object"
    elif isinstance(error, tf.errors.NotFoundError):
        no_bucket = re.search("specified bucket .*(does not exist|was not found)", cause)
        reason = f"no such bucket: {bucket}" if no_bucket else f"no such object in bucket {bucket}"
    elif tried := re.match(r"All (\d+) retry attempts failed", message):
        reason = f"Cloud Storage gave no answer to the bucket {bucket} in {int(tried[1]) + 1} tries"
    else:
        return f"cannot be {done} ({cause})"
    return f"cannot be {done}: {reason} ({cause})"


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns what Cloud Storage refuses, wherever in TensorFlow it surfaces, into one line.

    Raises:
      InputError: names the path that TensorFlow was at work on.
    """
    try:
        yield
    except tf.errors.OpError as error:
        message = str(error.message)
        if "executing an HTTP request" not in message:
            raise
        path = re.findall(r"gs://[^\s']+", message)
        if not path:  # TensorFlow names no path where it asks for the bucket
            raise InputError(f"Google Cloud Storage refuses ({_cause(message)})") from None
        written = re.search(" when (initiating|uploading|composing|renaming)", message)
        done = "written" if written else "deleted" if " when deleting" in message else "read"
        line = f"{path[-1]} {why(error, path[-1], done)}. What was written before is intact"
        raise InputError(line) from None


def _cause(message: str) -> str:
    """What Google says in the body of an answer, JSON or XML, or the message itself."""
    code = re.search(r"HTTP response code (\d+)", message)
    said = re.search(r'"message": "([^"]+)', message) or re.search("<Details>([^<]+)", message)
    text = f"{code[1]}: {said[1]}" if code and said else re.sub(r"^\{\{.*?\}\} ?", "", message)
    return " ".join(text.split())[:300]
