"""Sets of TFRecord files: found by their patterns, described, and remembered once checked."""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from pretraining.record_format import RecordFormat


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      path: local or gs:// path.
      records: how many it holds.
      size: bytes on disk.
      modified: time of the last change, nanoseconds since 1970.
      crc32: checksum over all records.
    """

    path: str
    records: int
    size: int
    modified: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class RecordSet:
    """A checked set of records.

    Attributes:
      shards: the files, in the order of their names.
      keys: name in the model -> name in the records.
      label_counts: [vocab_size] how often each token is to be predicted.
    """

    shards: tuple[Shard, ...]
    keys: dict[str, str]
    label_counts: np.ndarray

    @property
    def num_records(self) -> int:
        """Records in all files together."""
        return sum(shard.records for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A digest of the contents, wherever the files are."""
        contents = [(shard.records, shard.crc32) for shard in self.shards]
        return f"{zlib.crc32(repr(contents).encode()):08x}-{self.num_records}"

    def to_json(self) -> dict[str, Any]:
        """The set as plain values, for a cache."""
        counts = {int(i): int(self.label_counts[i]) for i in np.flatnonzero(self.label_counts)}
        return {**dataclasses.asdict(self), "label_counts": counts}

    @classmethod
    def from_json(cls, values: dict[str, Any], vocab_size: int) -> "RecordSet":
        """The reverse of `to_json`."""
        counts = np.zeros(vocab_size, np.int64)
        for token, count in values["label_counts"].items():
            counts[int(token)] = count
        return cls(tuple(Shard(**s) for s in values["shards"]), values["keys"], counts)


def size_and_time(path: str) -> tuple[int, int]:
    """Returns a file's size in bytes and its time of change in nanoseconds since 1970."""
    status = tf.io.gfile.stat(path)
    return status.length, status.mtime_nsec


def read_cache(path: str, files: Sequence[str], record_format: RecordFormat) -> RecordSet | None:
    """Returns what `check_records` found earlier, if the same files still stand there."""
    try:
        with tf.io.gfile.GFile(path) as file:
            values = json.load(file)
        if values["format"] != dataclasses.asdict(record_format):
            return None
        records = RecordSet.from_json(values["records"], record_format.vocab_size)
    except (tf.errors.OpError, ValueError, KeyError, TypeError):
        return None
    then = {shard.path: (shard.size, shard.modified) for shard in records.shards}
    return records if then == {path: size_and_time(path) for path in files} else None


def write_cache(path: str, records: RecordSet, record_format: RecordFormat) -> None:
    """Keeps the result of `check_records` for the next start."""
    values = {"format": dataclasses.asdict(record_format), "records": records.to_json()}
    with tf.io.gfile.GFile(path, "w") as file:
        json.dump(values, file)
