"""TFRecord files read from any record on, and past damage."""

import struct
from collections.abc import Iterator

import tensorflow as tf

FRAME_BYTES = 16  # length, its checksum, the payload's checksum
HEADER_BYTES = 12
BUFFER_BYTES = 1 << 19  # about a window of records
RECORDS_AT_ONCE = 512
HOPS = 8


def records_from(path: tf.Tensor | str, offset: tf.Tensor | int) -> tf.data.Dataset:
    """Returns the payloads of a file's records, beginning with the one at a byte offset.

    `tf.data.TFRecordDataset` begins at the first record only; the operation under it can do more.
    """
    # In a function of flat_map: TensorFlow cannot serialise the operation, as it would outside.
    place = tf.data.Dataset.from_tensors((path, tf.cast(offset, tf.int64)))
    return place.flat_map(nested_records_from)


def nested_records_from(path: tf.Tensor, offset: tf.Tensor) -> tf.data.Dataset:
    """As `records_from`, for use inside a function of `flat_map`, where it is faster."""
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path], compression_type="", buffer_size=BUFFER_BYTES, byte_offsets=[offset]
    )
    return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))


def runs(
    path: str, size: int, known: dict[int, int] | None = None
) -> Iterator[tuple[int, int, list[bytes]]]:
    """Yields runs of good records of a file, in order.

    Args:
      path: local or gs:// path.
      size: bytes in the file.
      known: byte offsets of some records, by number, where reading can begin again if the length
        of a damaged record is lost.

    Yields:
      (number of the first record, its byte offset, payloads). An empty list of payloads stands
      for one damaged record; where its length is lost, for all up to the next one that is known,
      or to the end of the file.
    """
    record, offset = 0, 0
    while offset < size:
        try:
            for batch in records_from(path, offset).batch(RECORDS_AT_ONCE).as_numpy_iterator():
                payloads = batch.tolist()
                yield record, offset, payloads
                record, offset = record + len(payloads), offset + _framed(payloads)
        except tf.errors.DataLossError:
            payloads = _before_damage(path, offset)
            if payloads:
                yield record, offset, payloads
                record, offset = record + len(payloads), offset + _framed(payloads)
        if offset >= size:
            return
        # Damage, or a file that ends inside a header, which TensorFlow takes for whole.
        yield record, offset, []
        following = _following(path, offset, size)
        if following is not None:
            record, offset = record + 1, following
            continue
        later = sorted((n, o) for n, o in (known or {}).items() if n > record and o < size)
        if not later:
            return
        record, offset = later[0]


def _framed(payloads: list[bytes]) -> int:
    return sum(map(len, payloads)) + FRAME_BYTES * len(payloads)


def _before_damage(path: str, offset: int) -> list[bytes]:
    payloads = []
    try:
        for payload in records_from(path, offset).take(RECORDS_AT_ONCE).as_numpy_iterator():
            payloads.append(payload)
    except tf.errors.DataLossError:
        pass
    return payloads


def _following(path: str, offset: int, size: int) -> int | None:
    """Finds where the next record begins, if the length of the damaged one makes sense.

    It does if the records from there on can be read, or end where the file ends; another damaged
    one or some may follow at once.
    """
    first, position = None, offset
    for _ in range(HOPS):
        length = _length_at(path, position)
        if length is None or position + length + FRAME_BYTES > size:
            return None
        position += length + FRAME_BYTES
        first = first or position
        if position == size:
            return first
        try:
            if list(records_from(path, position).take(1)):
                return first
        except tf.errors.DataLossError:
            continue
    return None


def _length_at(path: str, offset: int) -> int | None:
    with tf.io.gfile.GFile(path, "rb") as file:
        file.seek(offset)
        header = file.read(HEADER_BYTES)
    return struct.unpack("<Q", header[:8])[0] if len(header) == HEADER_BYTES else None
