"""Sets of TFRecord files: what is known of them, how they are dealt to lanes, what is remembered."""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from pretraining.record_format import RecordFormat

MAX_LANES = 256
LANE_TOLERANCE = 0.01  # how much more than another a lane may hold


@dataclasses.dataclass(frozen=True)
class DamagedWindow:
    """A window of a shard in which some records cannot be used.

    Attributes:
      index: place of the window in its shard.
      runs: (place in the window, byte offset in the file, count) of every run of good records.
    """

    index: int
    runs: tuple[tuple[int, int, int], ...]

    @property
    def good(self) -> int:
        """Records that can be used."""
        return sum(count for _, _, count in self.runs)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      path: local or gs:// path.
      records: how many it holds, damaged ones included.
      size: bytes in storage.
      crc32: zlib's checksum over the bytes of all records, one after the other.
      offsets: byte offset in the file of the first record of each window.
      damaged: windows with records that `--skip_corrupt_records` leaves out.
    """

    path: str
    records: int
    size: int
    crc32: int
    offsets: tuple[int, ...]
    damaged: tuple[DamagedWindow, ...] = ()

    def corrupt_records(self, window: int) -> int:
        """Records that cannot be used."""
        return sum(min(window, self.records - w.index * window) - w.good for w in self.damaged)


@dataclasses.dataclass(frozen=True)
class DynamicMasking:
    """How the input pipeline masks records that come without masks.

    Attributes:
      masked_lm_prob: the part of the tokens to predict.
      do_whole_word_mask: whether the pieces of a word are masked together.
    """

    masked_lm_prob: float
    do_whole_word_mask: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSet:
    """A known set of records.

    Attributes:
      shards: the files, in the order of their names.
      window: records in a window, within which an epoch permutes them.
      keys: name in the model -> name in the records.
      label_counts: [vocab_size] how often each token is to be predicted; under dynamic masking,
        how often it may be.
      masking: None where masks come with the records.
    """

    shards: tuple[Shard, ...]
    window: int
    keys: dict[str, str]
    label_counts: np.ndarray
    masking: DynamicMasking | None = None

    @property
    def num_records(self) -> int:
        """Records in all files together."""
        return sum(shard.records for shard in self.shards)

    @property
    def corrupt_records(self) -> int:
        """Records in whose place `--skip_corrupt_records` puts others."""
        return sum(shard.corrupt_records(self.window) for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A digest of the contents, wherever the files are."""
        contents: list[Any] = [(shard.records, shard.crc32) for shard in self.shards]
        if self.masking is not None:
            contents.append(dataclasses.astuple(self.masking))
        return f"{zlib.crc32(repr(contents).encode()):08x}-{self.num_records}"

    def lanes(self) -> list[list[int]]:
        """Deals the shards to lanes: places in `shards`, for each lane.

        There are as many lanes, a power of two up to 256, as leave each with the same number of
        records within a hundredth: a lane that held less would show its records more often.
        """
        used = [i for i, shard in enumerate(self.shards) if shard.records]
        used.sort(key=lambda i: -self.shards[i].records)
        count = MAX_LANES
        while count > 1:
            lanes: list[list[int]] = [[] for _ in range(count)]
            sizes = [0] * count
            for i in used if len(used) >= count else []:
                lane = sizes.index(min(sizes))
                lanes[lane].append(i)
                sizes[lane] += self.shards[i].records
            if min(sizes) and max(sizes) - min(sizes) <= max(1, LANE_TOLERANCE * min(sizes)):
                return [sorted(lane) for lane in lanes]
            count //= 2
        return [sorted(used)]

    def to_json(self) -> dict[str, Any]:
        """The set as plain values, for a cache."""
        counts = {int(i): int(self.label_counts[i]) for i in np.flatnonzero(self.label_counts)}
        return {**dataclasses.asdict(self), "label_counts": counts}

    @classmethod
    def from_json(cls, values: dict[str, Any], vocab_size: int) -> "RecordSet":
        """The reverse of `to_json`."""
        shards = tuple(
            Shard(
                **{
                    **shard,
                    "offsets": tuple(shard["offsets"]),
                    "damaged": tuple(
                        DamagedWindow(w["index"], tuple(map(tuple, w["runs"])))
                        for w in shard["damaged"]
                    ),
                }
            )
            for shard in values["shards"]
        )
        masking = values["masking"] and DynamicMasking(**values["masking"])
        counts = dense_counts(values["label_counts"], vocab_size)
        return cls(**{**values, "shards": shards, "masking": masking, "label_counts": counts})


def dense_counts(counts: dict[str, int], vocab_size: int) -> np.ndarray:
    """Turns counts by token id, as JSON keeps them, into an array [vocab_size]."""
    dense = np.zeros(vocab_size, np.int64)
    for token, count in counts.items():
        dense[int(token)] = count
    return dense


def stamp(path: str) -> list[int]:
    """Returns a file's size in bytes and its time of change in nanoseconds since 1970."""
    status = tf.io.gfile.stat(path)
    return [status.length, status.mtime_nsec]


def read_cache(path: str, files: Sequence[str], record_format: RecordFormat) -> RecordSet | None:
    """Returns what `RecordCheck` found earlier, if the same files still stand there."""
    try:
        with tf.io.gfile.GFile(path) as file:
            values = json.load(file)
        if values["format"] != dataclasses.asdict(record_format):
            return None
        if values["stamps"] != {name: stamp(name) for name in files}:
            return None
        return RecordSet.from_json(values["records"], record_format.vocab_size)
    except (tf.errors.OpError, ValueError, KeyError, TypeError):
        return None


def write_cache(path: str, records: RecordSet, record_format: RecordFormat) -> None:
    """Keeps the result of `RecordCheck` for the next start."""
    values = {
        "format": dataclasses.asdict(record_format),
        "stamps": {shard.path: stamp(shard.path) for shard in records.shards},
        "records": records.to_json(),
    }
    with tf.io.gfile.GFile(path, "w") as file:
        json.dump(values, file)
