"""Checks records, and names the file and the record that does not fit."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf

from pretraining import record_reading
from pretraining.errors import InputError
from pretraining.files import why
from pretraining.record_format import RECORD_KEYS, RecordFormat, features
from pretraining.record_reading import FRAME_BYTES
from pretraining.records import DamagedWindow, RecordSet, Shard

WINDOW = 8192
LEAST_WINDOW = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """A reading of every record: framing, checksums, lengths and the range of every value.

    Attributes:
      record_format: what every record must hold.
      flag: named in the error messages.
      known: what a manifest says of the files, if there is one.
      on_corrupt: called with a line about each record that does not fit; the check goes on
        then. None: the first one raises.
      on_progress: called with the size in bytes of each file that has been read.
      on_records: called with the path, the numbers and the decoded features of good records.
    """

    record_format: RecordFormat
    flag: str
    known: RecordSet | None = None
    on_corrupt: Callable[[str], None] | None = None
    on_progress: Callable[[int], None] = lambda size: None
    on_records: Callable[[str, np.ndarray, dict[str, np.ndarray]], None] = lambda *run: None

    def run(self, files: Sequence[str]) -> RecordSet:
        """Reads the files.

        Args:
          files: paths of TFRecord files.

        Returns:
          What was found; of a file in the manifest, its shard there and the damage.

        Raises:
          InputError: a file is no TFRecord file, or a record does not fit; names file and record.
        """
        keys = self.known.keys if self.known else self._record_keys(files)
        window = self.known.window if self.known else max(LEAST_WINDOW, WINDOW // len(files))
        label_counts = np.zeros(self.record_format.vocab_size, np.int64)
        known = {shard.path: shard for shard in self.known.shards} if self.known else {}
        shards = []
        for path in files:
            shards.append(self._read(path, known.get(path), keys, window, label_counts))
            self.on_progress(shards[-1].size)
        if not any(shard.records for shard in shards):
            raise InputError(
                f"{self.flag}={files[0]}: expected records. Received: only empty files"
            )
        if self.known:
            return dataclasses.replace(self.known, shards=tuple(shards))
        return RecordSet(shards=tuple(shards), window=window, keys=keys, label_counts=label_counts)

    def _read(
        self,
        path: str,
        known: Shard | None,
        keys: dict[str, str],
        window: int,
        label_counts: np.ndarray,
    ) -> Shard:
        size, checksum, records = tf.io.gfile.stat(path).length, 0, 0
        offsets: list[int] = []
        damage = _Damage(window)
        places = {i * window: o for i, o in enumerate(known.offsets)} if known else None
        for first, offset, payloads in self._runs(path, size, places):
            if first > records:  # lost with the length of the record before them
                damage.mark(records, first)
            if not payloads:
                self._report(self._damaged(path, first))
                damage.mark(first, first + 1)
                if first % window == 0:
                    offsets.append(offset)
                records = first + 1
                continue
            examples, faults = self._decode(payloads, keys, path, first)
            for row, text in faults.items():
                self._report(text)
                damage.mark(first + row, first + row + 1)
            if examples:
                rows = [row for row in range(len(payloads)) if row not in faults]
                self.on_records(path, first + np.array(rows), examples)
            if "masked_lm_ids" in examples:
                labels = examples["masked_lm_ids"][examples["masked_lm_weights"] > 0]
                label_counts += np.bincount(labels, minlength=len(label_counts))
            for row, payload in enumerate(payloads):
                checksum = zlib.crc32(payload, checksum)
                if (first + row) % window == 0:
                    offsets.append(offset)
                if row not in faults:
                    damage.good(first + row, offset)
                offset += len(payload) + FRAME_BYTES
            records = first + len(payloads)
        if known is None:
            return Shard(path, records, size, checksum, tuple(offsets), damage.windows())
        if records < known.records:  # cut, or lost up to the end
            if not damage:
                self._report(self._damaged(path, records))
            damage.mark(records, known.records)
        elif records > known.records or (checksum != known.crc32 and not damage):
            self._report(
                f"{self.flag}={path}: expected the {known.records} records of the manifest.json "
                f"beside it, checksum {known.crc32}. Received: {records}, checksum {checksum}"
            )
        elif not damage and tuple(offsets) != known.offsets:
            wrong = next(i for i, o in enumerate(offsets) if o != known.offsets[i])
            self._report(
                f"{self.flag}={path}: record {wrong * window}: expected at byte {known.offsets[wrong]}, "
                f"as the manifest.json beside it says. Received: at byte {offsets[wrong]}"
            )
        return dataclasses.replace(known, damaged=damage.windows())

    def _report(self, text: str) -> None:
        if self.on_corrupt is None:
            raise InputError(text)
        self.on_corrupt(text)

    def _runs(self, path: str, size: int, places: dict[int, int] | None) -> Iterable:
        try:
            yield from record_reading.runs(path, size, places)
        except tf.errors.OpError as error:
            raise InputError(f"{self.flag}={path}: {why(error, path, 'read')}") from None

    def _damaged(self, path: str, record: int) -> str:
        what = "expected a TFRecord file" if record == 0 else f"record {record} is damaged"
        return f"{self.flag}={path}: {what}. Received: other bytes, or fewer, at record {record}"

    def _record_keys(self, files: Sequence[str]) -> dict[str, str]:
        """Tells from the first record which names the features have."""
        for path in files:
            size = tf.io.gfile.stat(path).length
            for first, _, payloads in self._runs(path, size, None):
                if not payloads:
                    self._report(self._damaged(path, first))
                    continue
                try:
                    present = set(decode_example(payloads[0]).features.feature)
                except ValueError:
                    present = set()
                return _keys_of(present, f"{self.flag}={path}: record {first}")
        return {name: candidates[0] for name, candidates in RECORD_KEYS.items()}

    def _decode(
        self, payloads: list[bytes], keys: dict[str, str], path: str, first: int
    ) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """Returns the features of the good records, and what is wrong with each other one."""
        where = f"{self.flag}={path}"
        try:
            return self._parse(payloads, keys, where, first), {}
        except InputError as error:
            if self.on_corrupt is None:
                raise InputError(str(error)) from None
        faults = {}
        for row, payload in enumerate(payloads):
            try:
                self._parse([payload], keys, where, first + row)
            except InputError as error:
                faults[row] = str(error)
        good = [payload for row, payload in enumerate(payloads) if row not in faults]
        return self._parse(good, keys, where, first) if good else {}, faults

    def _parse(self, payloads, keys: dict[str, str], where: str, first: int):
        try:
            parsed = tf.io.parse_example(payloads, features(keys, self.record_format))
        except tf.errors.InvalidArgumentError:
            for row, payload in enumerate(payloads):
                _explain(payload, keys, self.record_format, f"{where}: record {first + row}")
            raise
        examples = {name: parsed[key].numpy() for name, key in keys.items()}
        _check_ranges(examples, self.record_format, where, first)
        return examples


class _Damage:
    """Windows with records that cannot be used, put together while a file is read in order."""

    def __init__(self, window: int):
        self._window = window
        self._bad: set[int] = set()
        self._runs: dict[int, list[list[int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._bad)

    def mark(self, first: int, end: int) -> None:
        """Notes records that cannot be used, from `first` up to `end`."""
        self._bad.update(range(first // self._window, (end - 1) // self._window + 1))

    def good(self, record: int, offset: int) -> None:
        """Notes a good record and where it begins."""
        index, place = divmod(record, self._window)
        if index not in self._runs:
            # A window without damage needs no list of its runs.
            self._runs = {i: runs for i, runs in self._runs.items() if i in self._bad}
            self._runs[index] = []
        runs = self._runs[index]
        if runs and runs[-1][0] + runs[-1][2] == place:
            runs[-1][2] += 1
        else:
            runs.append([place, offset, 1])

    def windows(self) -> tuple[DamagedWindow, ...]:
        """Returns the damaged windows, in order."""
        return tuple(
            DamagedWindow(index, tuple(map(tuple, self._runs.get(index, []))))
            for index in sorted(self._bad)
        )


def decode_example(record: bytes) -> tf.train.Example:
    """Decodes a record; raises `ValueError` where it is no example."""
    try:
        return tf.train.Example.FromString(record)
    except Exception as error:  # protobuf's DecodeError, whose module depends on its version
        raise ValueError(str(error)) from None


def _keys_of(present: set[str], where: str) -> dict[str, str]:
    keys = {}
    for name, candidates in RECORD_KEYS.items():
        key = next((c for c in candidates if c in present), None)
        if key is None:
            raise InputError(
                f"{where}: expected the feature {candidates[0]}. "
                f"Received: {', '.join(sorted(present)) or 'no tf.train.Example'}"
            )
        keys[name] = key
    return keys


def _explain(record: bytes, keys: dict[str, str], record_format: RecordFormat, where: str) -> None:
    """Raises the error that fits a record which does not parse; returns if it does parse."""
    try:
        example = decode_example(record)
    except ValueError:
        raise InputError(f"{where}: expected a tf.train.Example. Received: other bytes") from None
    for name, key in keys.items():
        if key not in example.features.feature:
            raise InputError(f"{where}: expected the feature {key}. Received: none of that name")
        feature = example.features.feature[key]
        kind = "float_list" if name.endswith("weights") else "int64_list"
        if feature.WhichOneof("kind") != kind:
            raise InputError(
                f"{where}: expected {key} as {kind}. Received: {feature.WhichOneof('kind')}"
            )
        received, expected = len(getattr(feature, kind).value), record_format.length(name)
        if received != expected:
            flag = "max_predictions_per_seq" if "masked" in name else "max_seq_length"
            raise InputError(
                f"{where}: expected {expected} values of {key} (--{flag}={expected}). "
                f"Received: {received}"
            )


def _check_ranges(examples, record_format: RecordFormat, where: str, start: int) -> None:
    for name, values in examples.items():
        if name.endswith("weights"):
            wrong = ~(np.isfinite(values) & (values >= 0))
            expected = "finite weights of at least 0"
        else:
            limit = record_format.limit(name)
            wrong = (values < 0) | (values >= limit)
            expected = f"values from 0 to {limit - 1}"
            if limit == record_format.vocab_size and name.endswith("ids"):
                expected = f"ids of the vocabulary, 0 to {limit - 1} (--vocab_file)"
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise InputError(
                f"{where}: record {start + row}: expected {RECORD_KEYS[name][0]} to be {expected}. "
                f"Received: {values[row, column]} at place {column}"
            )
