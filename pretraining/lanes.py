"""Records in an order that is a function of (seed, position), read from any position on.

The shards of a set are dealt to K lanes. A run's rows come from the lanes in turn, `chunk` rows from
each: row p is record (p // (K chunk)) chunk + p mod chunk of lane (p // chunk) mod K. In epoch e a lane
visits its shards in an order drawn from (seed, e, lane), and the records of each window of a shard in
an order drawn from (seed, e, lane, shard, window). So a restart opens one window of each lane.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from pretraining.errors import InputError
from pretraining.files import on_gcs
from pretraining.record_reading import nested_records_from
from pretraining.records import RecordSet

READS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Damage:
    """What stands in for the damaged windows of a set, as tables to look things up in.

    Attributes:
      windows: [n] number in the set of each damaged window, ascending.
      run_starts: [n + 1] where its runs begin in `offsets` and `counts`.
      offsets: byte offset of each run of good records.
      counts: its length.
      place_starts: [n + 1] where its places begin in `places`.
      places: for each place in the window, the place among the good records that is read for it.
    """

    windows: np.ndarray
    run_starts: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray
    place_starts: np.ndarray
    places: np.ndarray


def _damage(records: RecordSet, first_windows: np.ndarray) -> Damage:
    """The next good record of a window stands in for a bad one, after the last the first one.

    Where a window has no good record, those of the next one in its shard that has some do.
    """
    windows, offsets, counts, places = [], [], [], []
    run_starts, place_starts = [0], [0]
    for shard, first in zip(records.shards, first_windows, strict=True):
        bad = {window.index: window for window in shard.damaged}
        for index in sorted(bad):
            number, source = len(shard.offsets), index
            while source in bad and not bad[source].good:
                source = (source + 1) % number
                if source == index:
                    raise InputError(
                        f"{shard.path}: expected records. Received: none that is sound"
                    )
            rows = min(records.window, shard.records - index * records.window)
            if source in bad:
                runs = bad[source].runs
            else:
                length = min(records.window, shard.records - source * records.window)
                runs = ((0, shard.offsets[source], length),)
            good = np.concatenate([np.arange(place, place + n) for place, _, n in runs])
            windows.append(first + index)
            offsets += [offset for _, offset, _ in runs]
            counts += [n for _, _, n in runs]
            run_starts.append(len(offsets))
            places += (np.searchsorted(good, np.arange(rows)) % len(good)).tolist()
            place_starts.append(len(places))
    return Damage(*map(_int64, (windows, run_starts, offsets, counts, place_starts, places)))


def _int64(values) -> np.ndarray:
    return np.array(values, np.int64)


class Lanes:
    """The lanes of a set of records, as data sets of serialised records."""

    def __init__(self, records: RecordSet, seed: int):
        self._seed = seed
        self._window = records.window
        self._paths = [shard.path for shard in records.shards]
        self._is_remote = any(map(on_gcs, self._paths))
        self._records = _int64([shard.records for shard in records.shards])
        self._windows = _int64([len(shard.offsets) for shard in records.shards])
        self._first_windows = np.cumsum(self._windows) - self._windows
        self._offsets = _int64([o for shard in records.shards for o in shard.offsets])
        self._damage = None
        if any(shard.damaged for shard in records.shards):
            self._damage = _damage(records, self._first_windows)
        lanes = records.lanes()
        self._shards = _int64([shard for lane in lanes for shard in lane])
        self._starts = np.cumsum([0, *map(len, lanes)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def shards_at(self, lane: int, record: int) -> list[str]:
        """Returns the files of a lane in the order in which it visits them from a record on."""
        lane = tf.constant(lane, tf.int64)
        epoch, offset = self._locate(lane, record)
        order, _, first, _ = self._epoch(lane, epoch, offset)
        following = self._epoch(lane, epoch + 1, tf.zeros_like(offset))[0]
        shards = [*order.numpy()[int(first) :], *following.numpy()]
        return [self._paths[shard] for shard in shards]

    def _locate(self, lane, record) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (epoch, record in the epoch) of a record of a lane."""
        size = tf.reduce_sum(tf.gather(self._records, self._shards_of(lane)))
        record = tf.cast(record, tf.int64)
        return record // size, record % size

    def _shards_of(self, lane) -> tf.Tensor:
        starts = tf.constant(self._starts)
        return tf.constant(self._shards)[starts[lane] : starts[lane + 1]]

    def _epoch(self, lane, epoch, skipped):
        """Returns the epoch's shards in order, its seed, and the shard and record to begin with."""
        seed = _fold([self._seed & 0xFFFFFFFF, 0], epoch, lane)
        order = tf.random.experimental.stateless_shuffle(self._shards_of(lane), seed)
        counts = tf.gather(self._records, order)
        ends = tf.cumsum(counts)
        first = tf.searchsorted(ends, [skipped], side="right", out_type=tf.int64)[0]
        return order, seed, first, skipped - (ends[first] - counts[first])

    def rows(self, lanes: np.ndarray, chunk: int, record: int) -> tf.data.Dataset:
        """Endless rows of some lanes in turn, from one record of each lane on.

        Args:
          lanes: numbers of the lanes.
          chunk: rows from each at a time.
          record: the record of each lane to begin with.

        Returns:
          Serialised records, [chunk] strings an element.
        """

        def read(lane: tf.Tensor) -> tf.data.Dataset:
            return self._lane(lane, record).rebatch(chunk, drop_remainder=True)

        numbers = tf.data.Dataset.from_tensor_slices(_int64(lanes))
        if len(lanes) == 1:
            return numbers.flat_map(read)
        together: dict[str, Any] = {}
        if self._is_remote:  # files far away are opened many at once; the order is the same
            together = {
                "num_parallel_calls": min(READS_AT_ONCE, len(lanes)),
                "deterministic": True,
            }
        return numbers.interleave(read, cycle_length=len(lanes), block_length=1, **together)

    def in_order(self) -> tf.data.Dataset:
        """Every record once, in the order of the files."""
        shard = np.repeat(np.arange(len(self._windows)), self._windows)
        index = np.concatenate([np.arange(n) for n in self._windows])
        windows = tf.data.Dataset.from_tensor_slices((_int64(shard), index))
        return windows.flat_map(self._read).unbatch()

    def _lane(self, lane: tf.Tensor, record: int) -> tf.data.Dataset:
        """Endless windows of one lane, each a vector of serialised records in its epoch's order."""
        first_epoch, offset = self._locate(lane, record)

        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            skipped = tf.where(number == first_epoch, offset, 0)
            order, seed, first, within = self._epoch(lane, number, skipped)
            order = order[first:]
            counts = tf.gather(self._windows, order)
            shard = tf.repeat(order, counts)
            index = tf.range(tf.reduce_sum(counts)) - tf.repeat(
                tf.cumsum(counts, exclusive=True), counts
            )
            begin = within // self._window
            places = tf.data.Dataset.from_tensor_slices((shard[begin:], index[begin:]))

            def window(number: tf.Tensor, place: tuple[tf.Tensor, tf.Tensor]) -> tf.data.Dataset:
                skip = tf.where(number == 0, within % self._window, 0)
                window_seed = _fold(seed, *place)
                return self._read(*place).map(
                    lambda rows: tf.random.experimental.stateless_shuffle(rows, window_seed)[skip:]
                )

            return places.enumerate().flat_map(window)

        return tf.data.Dataset.counter(start=first_epoch, dtype=tf.int64).flat_map(epoch)

    def _read(self, shard: tf.Tensor, index: tf.Tensor) -> tf.data.Dataset:
        """One window as one vector, in the order of the file."""
        path = tf.gather(tf.constant(self._paths), shard)
        number = tf.gather(self._first_windows, shard) + index
        offset = tf.gather(self._offsets, number)
        rows = tf.minimum(tf.gather(self._records, shard) - index * self._window, self._window)
        if self._damage is None:
            return nested_records_from(path, offset).take(rows).batch(self._window)
        offsets, counts, places = self._stand_ins(number, offset, rows)
        runs = tf.data.Dataset.from_tensor_slices((offsets, counts))
        good = runs.flat_map(lambda offset, count: nested_records_from(path, offset).take(count))
        return good.batch(self._window).map(lambda records: tf.gather(records, places))

    def _stand_ins(self, number, offset, rows) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the runs to read for a window, and the place among their records of each row."""
        damage = self._damage
        found = tf.searchsorted(damage.windows, [number], out_type=tf.int64)[0]
        found = tf.minimum(found, len(damage.windows) - 1)

        def damaged():
            runs = slice(
                tf.gather(damage.run_starts, found), tf.gather(damage.run_starts, found + 1)
            )
            span = slice(
                tf.gather(damage.place_starts, found), tf.gather(damage.place_starts, found + 1)
            )
            offsets, counts, places = map(
                tf.constant, (damage.offsets, damage.counts, damage.places)
            )
            return offsets[runs], counts[runs], places[span]

        return tf.cond(
            tf.gather(damage.windows, found) == number,
            damaged,
            lambda: (offset[None], rows[None], tf.range(rows)),
        )


def _fold(seed, *numbers) -> tf.Tensor:
    for number in numbers:
        seed = tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int64), number)
    return seed
