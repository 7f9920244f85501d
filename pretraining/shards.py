"""From the files of all blocks to shards: TFRecord files of examples in the order of their keys.

Keys are random, so this is a shuffle of the whole corpus, and what a shard holds depends neither on
who made the blocks nor when.
"""

import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from pretraining import array_files, masking, record_rows
from pretraining.block_files import Making
from pretraining.examples import Examples
from pretraining.record_reading import FRAME_BYTES
from pretraining.record_rows import ROWS_AT_ONCE, Rows

WINDOW = 1024  # records; the manifest tells where each window begins in its file
TOKENS_AT_ONCE = 1 << 24  # of examples in memory
_BIN_BITS = 20  # of a key, in the histogram of all keys
_KEYS = 1 << 64


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to be made.

    Attributes:
      name: of the file.
      records: how many it will hold.
      lower: the least key of its examples.
      upper: the keys lie below it.
    """

    name: str
    records: int
    lower: int
    upper: int


def plan(paths: Sequence[str], num_shards: int, name: str = "records") -> list[Shard]:
    """Divides the keys of all examples so that no shard holds two records more than another.

    (But where two examples share a key at a border, once in billions of borders.)

    Args:
      paths: files of examples.
      num_shards: at most as many as there are examples.
      name: the files' names begin with it.
    """
    shift = np.uint64(64 - _BIN_BITS)
    bins = np.zeros(1 << _BIN_BITS, np.int64)
    for path in paths:
        bins += np.bincount(array_files.map_arrays(path)["keys"] >> shift, minlength=len(bins))
    ends = np.cumsum(bins)
    total = int(ends[-1])
    ranks = np.array([i * total // num_shards for i in range(num_shards)], np.int64)
    border_bins = np.unique(np.searchsorted(ends, ranks, side="right"))
    at_border = np.zeros(len(bins), bool)
    at_border[border_bins] = True
    found = [np.empty(0, np.uint64)]
    for path in paths:
        keys = array_files.map_arrays(path)["keys"]
        found.append(keys[at_border[keys >> shift]])
    keys = np.sort(np.concatenate(found))
    # The rank of a key among those found, from its rank among all.
    left_out = np.cumsum(bins * ~at_border)[np.searchsorted(ends, ranks, side="right")]
    lower = [0, *keys[ranks - left_out][1:].tolist()]
    return [
        Shard(f"{name}-{i:05d}-of-{num_shards:05d}.tfrecord", int(records), *bounds)
        for i, (records, bounds) in enumerate(
            zip(np.diff([*ranks, total]), zip(lower, [*lower[1:], _KEYS], strict=True), strict=True)
        )
    ]


def _slices(keys: np.ndarray, lower: int, upper: int) -> slice:
    end = len(keys) if upper == _KEYS else int(np.searchsorted(keys, np.uint64(upper)))
    return slice(int(np.searchsorted(keys, np.uint64(lower))), end)


def gather(paths: Sequence[str], lower: int, upper: int) -> Examples:
    """Returns the examples with keys in [lower, upper), in ascending order."""
    keys, tokens, lengths, a_lengths, is_random = [], [], [], [], []
    for path in paths:
        arrays = array_files.map_arrays(path)
        chosen = _slices(arrays["keys"], lower, upper)
        if chosen.start < chosen.stop:
            starts = arrays["starts"][chosen.start : chosen.stop + 1].astype(np.int64)
            keys.append(arrays["keys"][chosen])
            tokens.append(np.array(arrays["tokens"][starts[0] : starts[-1]]))
            lengths.append(np.diff(starts))
            a_lengths.append(arrays["a_lengths"][chosen])
            is_random.append(arrays["is_random"][chosen])
    if not keys:
        empty = np.empty(0, np.int64)
        return Examples(empty.astype(np.uint64), empty, empty, empty, empty, empty)
    key, length = np.concatenate(keys), np.concatenate(lengths)
    order = np.argsort(key, kind="stable")
    starts = np.cumsum(length) - length
    return Examples(
        key[order],
        np.concatenate(tokens),
        starts[order],
        length[order],
        np.concatenate(a_lengths)[order].astype(np.int64),
        np.concatenate(is_random)[order],
    )


class ShardWriter:
    """Writes shards; holds the compiled masking function."""

    def __init__(self, making: Making, masked: str):
        """Prepares for writing.

        Args:
          making: vocabulary and settings.
          masked: "static" for masks in the records, "dynamic" for the original tokens alone.
        """
        self._length = making.settings.max_seq_length
        self._size = len(making.vocabulary)
        self._kinds = masking.token_table(making.vocabulary).kinds
        self._mask: Callable[[Rows, np.ndarray], Rows] | None = None
        if masked == "static":
            masks = making.settings.masks
            self._mask = record_rows.masker(making.vocabulary, masks, self._length)

    def write(self, shard: Shard, paths: Sequence[str], path: str) -> dict[str, Any]:
        """Writes one shard.

        Args:
          shard: which one.
          paths: files of examples.
          path: the file to write, local or gs://; it is not there before it is whole: the caller
            gives it its name.

        Returns:
          What the manifest says of it, "label_counts" by token id, "tokens" that are no padding,
          "random" pairs, "masked" tokens and "lengths", the examples of each number of tokens.
        """
        facts = {"name": shard.name, "records": 0, "bytes": 0, "crc32": 0, "offsets": []}
        labels = np.zeros(self._size, np.int64)
        lengths, random = np.zeros(self._length + 1, np.int64), 0
        with tf.io.TFRecordWriter(path) as writer:
            for rows in self._rows(shard, paths):
                labels += np.bincount(self._labels(rows), minlength=self._size)
                counts = rows["input_mask"].sum(axis=1)
                lengths += np.bincount(counts, minlength=len(lengths))
                random += int(rows["next_sentence_labels"].sum())
                _write_rows(writer, rows, facts)
        return {
            **facts,
            "label_counts": {int(i): int(labels[i]) for i in np.flatnonzero(labels)},
            "tokens": int(lengths @ np.arange(len(lengths))),
            "random": random,
            "masked": int(labels.sum()) if self._mask else 0,
            "lengths": lengths.tolist(),
        }

    def _rows(self, shard: Shard, paths: Sequence[str]) -> Iterator[Rows]:
        pieces = -(-shard.records * self._length // TOKENS_AT_ONCE)
        # Keys are spread evenly: equal intervals of keys hold nearly equally many.
        borders = [
            shard.lower + (shard.upper - shard.lower) * i // pieces for i in range(pieces + 1)
        ]
        for lower, upper in itertools.pairwise(borders):
            found = gather(paths, lower, upper)
            for first in range(0, len(found.keys), ROWS_AT_ONCE):
                chunk = slice(first, first + ROWS_AT_ONCE)
                rows = found.rows(chunk, self._length)
                yield self._mask(rows, found.keys[chunk]) if self._mask else rows

    def _labels(self, rows: Rows) -> np.ndarray:
        """The tokens that are to be predicted; under dynamic masking, those that may be."""
        if self._mask:
            return rows["masked_lm_ids"][rows["masked_lm_weights"] > 0]
        tokens = rows["input_ids"][rows["input_mask"] > 0]
        return tokens[self._kinds[tokens] != masking.NEVER]


def _write_rows(writer: tf.io.TFRecordWriter, rows: Rows, facts: dict[str, Any]) -> None:
    for record in record_rows.serialize_rows(rows):
        if facts["records"] % WINDOW == 0:
            facts["offsets"].append(facts["bytes"])
        writer.write(record)
        facts["crc32"] = zlib.crc32(record, facts["crc32"])
        facts["records"] += 1
        facts["bytes"] += len(record) + FRAME_BYTES


def finish(facts: dict[str, Any], unfinished: str, path: str, note: str) -> None:
    """Gives a written shard its name, and notes what is known of it first.

    Args:
      facts: from `ShardWriter.write`.
      unfinished: the file that was written.
      path: its name from now on.
      note: local file for the facts, read again if the program is stopped.

    Raises:
      OSError: the file is not as long as what was written: the storage lost something.
    """
    size = tf.io.gfile.stat(unfinished).length
    if size != facts["bytes"]:
        raise OSError(f"{unfinished}: {facts['bytes']} bytes were written, {size} are there")
    with open(f"{note}.unfinished", "w") as file:
        json.dump(facts, file)
    os.rename(f"{note}.unfinished", note)
    tf.io.gfile.rename(unfinished, path, overwrite=True)
