"""From the tokens of examples to the features of records: padded, masked, serialised.

The keys are those of google-research/bert `create_pretraining_data.py`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from pretraining import masking
from pretraining.vocabulary import Vocabulary

# The features of a record; all are integers but the weights:
#   input_ids [max_seq_length]: token ids after masking, padded with [PAD]
#   input_mask [max_seq_length]: 1 for tokens, 0 for padding
#   segment_ids [max_seq_length]: 0 for [CLS] A [SEP], 1 for B [SEP], 0 for padding
#   masked_lm_positions [max_predictions_per_seq]: places of the tokens to predict
#   masked_lm_ids [max_predictions_per_seq]: the tokens that stood there
#   masked_lm_weights [max_predictions_per_seq]: 1 for real predictions
#   next_sentence_labels [1]: 1 where B is from another document
FLOAT_FEATURES = ("masked_lm_weights",)
SHARED_FEATURES = ("input_mask", "segment_ids", "masked_lm_weights", "next_sentence_labels")
ROWS_AT_ONCE = 1024  # masked in one call of a compiled function

Rows = dict[str, np.ndarray]  # [rows, values] of each feature


def pad(
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    a_lengths: np.ndarray,
    is_random: np.ndarray,
    max_seq_length: int,
) -> Rows:
    """Lays examples out as rows.

    Args:
      tokens: [tokens] of many examples, [CLS] A [SEP] B [SEP] each.
      starts: [rows] where the rows' examples begin in `tokens`.
      lengths: [rows] tokens of each.
      a_lengths: [rows] tokens in segment A.
      is_random: [rows] whether B is from another document.
      max_seq_length: values in a row.

    Returns:
      "input_ids", "input_mask", "segment_ids", "next_sentence_labels", int32.
    """
    places = np.arange(max_seq_length)
    used = places < lengths[:, None]
    indices = np.minimum(starts[:, None] + places, len(tokens) - 1)
    return {
        "input_ids": tokens[indices].astype(np.int32) * used,
        "input_mask": used.astype(np.int32),
        "segment_ids": (used & (places >= a_lengths[:, None] + 2)).astype(np.int32),
        "next_sentence_labels": is_random.astype(np.int32)[:, None],
    }


def masker(
    vocabulary: Vocabulary, settings: masking.MaskSettings, max_seq_length: int
) -> Callable[[Rows, np.ndarray], Rows]:
    """Returns a function that masks rows from `pad`, each as its key (uint64) says."""
    table = masking.token_table(vocabulary)

    @functools.partial(
        tf.function,
        input_signature=[
            tf.TensorSpec([ROWS_AT_ONCE, max_seq_length], tf.int32),
            tf.TensorSpec([ROWS_AT_ONCE, max_seq_length], tf.int32),
            tf.TensorSpec([ROWS_AT_ONCE, 2], tf.uint32),
        ],
    )
    def compiled(input_ids: tf.Tensor, input_mask: tf.Tensor, keys: tf.Tensor):
        return masking.mask_tokens(input_ids, input_mask, keys, table, settings)

    def mask(rows: Rows, keys: np.ndarray) -> Rows:
        count = len(keys)
        # Always the same shape: empty rows below the last ones.
        below = [(0, ROWS_AT_ONCE - count), (0, 0)]
        halves = np.ascontiguousarray(keys, "<u8").view("<u4").reshape(-1, 2)
        values = (rows["input_ids"], rows["input_mask"], halves)
        # On the CPU whatever the machine has: an accelerator's copies would cost more.
        with tf.device("/CPU:0"):
            masked = compiled(*(tf.constant(np.pad(value, below)) for value in values))
        masked = {name: value.numpy()[:count] for name, value in masked.items()}
        return {**rows, "input_ids": masked.pop("input_word_ids"), **masked}

    return mask


def serialize(example: Mapping[str, Sequence]) -> bytes:
    """Returns one example, a list of values for each feature, as a `tf.train.Example`."""
    features = tf.train.Features()
    for name, values in example.items():
        _values(features, name).extend(values)
    return _example(features.SerializeToString(deterministic=True))


def serialize_rows(rows: Rows) -> list[bytes]:
    """Returns what `serialize` returns for each row, in half the time.

    A map in a message is its entries one after the other, so an entry that many rows share, such
    as the mask of a full row, is encoded once.
    """
    columns = []
    for name in sorted(rows):  # the order of a deterministic message
        if name in SHARED_FEATURES:
            columns.append([_shared_entry(name, row.tobytes()) for row in rows[name]])
        else:
            columns.append([_entry(name, row) for row in rows[name].tolist()])
    return [_example(b"".join(entries)) for entries in zip(*columns, strict=True)]


def _values(features: tf.train.Features, name: str):
    feature = features.feature[name]
    return (feature.float_list if name in FLOAT_FEATURES else feature.int64_list).value


def _entry(name: str, values: Sequence) -> bytes:
    features = tf.train.Features()
    _values(features, name).extend(values)
    return features.SerializeToString()


@functools.lru_cache(maxsize=1 << 14)
def _shared_entry(name: str, data: bytes) -> bytes:
    dtype = np.float32 if name in FLOAT_FEATURES else np.int32
    return _entry(name, np.frombuffer(data, dtype).tolist())


def _example(features: bytes) -> bytes:
    """Puts serialised features into an `Example`: field 1, a message, preceded by its length."""
    head, length = bytearray(b"\x0a"), len(features)
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head) + features
