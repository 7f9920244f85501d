"""Text files as streams of bytes: local or gs://, plain, .gz or .bz2."""

import bz2
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator

import tensorflow as tf

from pretraining import files
from pretraining.errors import InputError

READ_BYTES = 4 << 20  # in one request to the storage
SAMPLE_BYTES = 65536  # looked at before a file is taken for text


class _Storage(io.RawIOBase):
    """A local or gs:// file as a raw stream that tells how much was read."""

    def __init__(self, path: str, on_progress: Callable[[int], None] | None = None) -> None:
        self._file = tf.io.gfile.GFile(path, "rb")
        self._on_progress = on_progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        if self._on_progress:
            self._on_progress(len(data))
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def open_text(
    path: str, on_progress: Callable[[int], None] | None = None
) -> Iterator[io.BufferedIOBase]:
    """Opens a file for reading, decompressed if its name ends in .gz or .bz2.

    Args:
      path: local or gs:// path.
      on_progress: called with the bytes on disk that were read since the last call.
    """
    with io.BufferedReader(_Storage(path, on_progress), READ_BYTES) as stored:
        if path.lower().endswith(".gz"):
            yield gzip.GzipFile(fileobj=stored)
        elif path.lower().endswith(".bz2"):
            yield bz2.BZ2File(stored)
        else:
            yield stored


@contextlib.contextmanager
def errors_named(path: str) -> Iterator[None]:
    """Turns what reading a file raises into one line that names it."""
    try:
        yield
    except tf.errors.OpError as error:
        raise InputError(f"{path}: {files.why(error, path, 'read')}") from None
    except (EOFError, OSError, zlib.error) as error:
        kind = "bzip2" if path.lower().endswith(".bz2") else "gzip"
        raise InputError(
            f"{path}: expected a whole {kind} file. Received: a damaged one ({error})"
        ) from None


def refuse_binary(path: str, start: bytes) -> None:
    """Checks the first bytes of a file.

    Raises:
      InputError: they hold a zero, as UTF-8 text never does and UTF-16 and most other files do.
    """
    if b"\0" in start[:SAMPLE_BYTES]:
        raise InputError(f"{path}: expected UTF-8 text. Received: bytes of zero, so no such text")
