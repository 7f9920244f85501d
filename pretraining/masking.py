"""Masked-LM masking of a batch, as pure tensor functions.

Section 3.1 of arXiv 1810.04805 as google-research/bert create_pretraining_data.py does it: 15% of
the tokens, in random order; 80% become [MASK], 10% stay, 10% become any token of the vocabulary.
Every random choice is a hash of the row's key and a place in the row, so a row is masked alike
alone and in any batch. Only standard operations: it runs in tf.data's map on any host.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from pretraining.vocabulary import Vocabulary

NEVER, STARTS, CONTINUES = 0, 1, 2  # what masking may do with a token id
NEVER_MASKED = ("[CLS]", "[SEP]", "[PAD]")

# Odd numbers near 2**64 and 2**32 over the golden ratio: their multiples spread evenly.
GOLDEN_64, GOLDEN_32 = 0x9E3779B97F4A7C15, 0x9E3779B9


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How many tokens are masked, and which together.

    Attributes:
      masked_lm_prob: part of a row's tokens that is predicted, [CLS] and [SEP] counted.
      max_predictions_per_seq: places for predictions in a row; no row has more.
      do_whole_word_mask: mask all pieces of a word or none.
    """

    masked_lm_prob: float = 0.15
    max_predictions_per_seq: int = 20
    do_whole_word_mask: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """What masking has to know of a vocabulary.

    Attributes:
      kinds: [vocab_size] int32, NEVER, STARTS or CONTINUES a word.
      mask_id: the id of [MASK].
    """

    kinds: np.ndarray
    mask_id: int


def token_table(vocabulary: Vocabulary) -> TokenTable:
    """Returns which ids are never masked, and which continue a word because of their ##."""
    kinds = [CONTINUES if token.startswith("##") else STARTS for token in vocabulary.tokens]
    for token in NEVER_MASKED:
        kinds[vocabulary.ids[token]] = NEVER
    return TokenTable(kinds=np.array(kinds, np.int32), mask_id=vocabulary.ids["[MASK]"])


def row_keys(seed: int, positions: tf.Tensor) -> tf.Tensor:
    """Returns keys for `mask_tokens` that do not resemble those of other positions or seeds.

    Args:
      seed: the run's seed.
      positions: [rows] int64, the rows' positions in the run.

    Returns:
      [rows, 2] uint32; no two positions of a seed have the same.
    """
    start = _mix_64(tf.constant((seed + GOLDEN_64) % 2**64, tf.uint64))
    keys = _mix_64(start + _uint_64(GOLDEN_64) * tf.bitcast(positions, tf.uint64))
    return tf.bitcast(keys, tf.uint32)


def mask_tokens(
    input_ids: tf.Tensor,
    input_mask: tf.Tensor,
    keys: tf.Tensor,
    table: TokenTable,
    settings: MaskSettings,
) -> dict[str, tf.Tensor]:
    """Masks tokens at random.

    Args:
      input_ids: [rows, length] int32 original tokens; the length is static.
      input_mask: [rows, length] int32, 1 for tokens and 0 for padding.
      keys: [rows, 2] uint32, all that the random choices of a row depend on.
      table: made from the vocabulary of `input_ids`.
      settings: how many tokens, and which together.

    Returns:
      "input_word_ids": [rows, length] int32 with masks; "masked_lm_positions", "masked_lm_ids"
      (the original tokens): [rows, max_predictions_per_seq] int32, in ascending order of the
      positions and padded with 0; "masked_lm_weights": the same shape, float32, 1 for predictions.
    """
    length, places = input_ids.shape[1], settings.max_predictions_per_seq
    kinds = tf.gather(tf.constant(table.kinds), input_ids) * input_mask
    budgets = tf.gather(_budgets(length, settings), tf.reduce_sum(input_mask, axis=1))
    choose = _choose_words if settings.do_whole_word_mask else _choose_tokens
    positions, chosen = choose(kinds, visit_scores(keys, length), budgets, min(places, length))
    if places > length:
        positions, chosen = (tf.pad(x, [[0, 0], [0, places - length]]) for x in (positions, chosen))
    flat = _flat(positions, length)
    labels = tf.gather(tf.reshape(input_ids, [-1]), flat) * chosen
    change = (_replacements(keys, positions, labels, table) - labels) * chosen
    # Padding adds zero to the first token.
    masked = tf.tensor_scatter_nd_add(
        tf.reshape(input_ids, [-1]), tf.reshape(flat, [-1, 1]), tf.reshape(change, [-1])
    )
    return {
        "input_word_ids": tf.reshape(masked, tf.shape(input_ids)),
        "masked_lm_positions": positions,
        "masked_lm_ids": labels,
        "masked_lm_weights": tf.cast(chosen, tf.float32),
    }


def visit_scores(keys: tf.Tensor, length: int) -> tf.Tensor:
    """Returns [rows, length] uint32: tokens (words by their first) are tried highest first.

    Of equal scores the first in the row comes first. No score is 0. The hash is C. Wellons's
    lowbias32 with the other half of the key put in between.
    """
    halves = tf.bitcast(_mix_64(tf.bitcast(keys, tf.uint64)), tf.uint32)
    steps = (np.arange(1, length + 1, dtype=np.uint64) * GOLDEN_32).astype(np.uint32)
    x = halves[:, :1] + tf.constant(steps)
    x = _xor_shift(x, 16) * tf.constant(0x7FEB352D, tf.uint32) + halves[:, 1:]
    x = _xor_shift(x, 15) * tf.constant(0x846CA68B, tf.uint32)
    return tf.bitwise.bitwise_or(x, tf.constant(1, tf.uint32))


def _budgets(length: int, settings: MaskSettings) -> tf.Tensor:
    """Returns the tokens to predict for each number of tokens, rounded as Python rounds."""
    wanted = [max(1, round(n * settings.masked_lm_prob)) for n in range(length + 1)]
    return tf.constant(np.minimum(wanted, settings.max_predictions_per_seq).astype(np.int32))


def _choose_tokens(
    kinds: tf.Tensor, scores: tf.Tensor, budgets: tf.Tensor, places: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Takes the tokens of the highest scores.

    Returns:
      Two [rows, places] int32: ascending positions, and 1 where there is one, else both 0.
    """
    length = kinds.shape[1]
    highest, order = tf.math.top_k(tf.where(kinds > 0, scores, tf.zeros_like(scores)), places)
    taken = (highest > 0) & (tf.range(places) < budgets[:, None])
    ascending = length - tf.math.top_k(tf.where(taken, length - order, 0), places)[0]
    chosen = tf.cast(ascending < length, tf.int32)
    return ascending * chosen, chosen


def _choose_words(
    kinds: tf.Tensor, scores: tf.Tensor, budgets: tf.Tensor, places: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The same for whole words, skipping those that do not fit any more."""
    length = kinds.shape[1]
    candidates = tf.cast(kinds > 0, tf.int32)
    before = tf.pad(candidates[:, :-1], [[0, 0], [1, 0]])
    inside = before * tf.cast(kinds == CONTINUES, tf.int32)  # 1 but for the first of a word
    words = tf.cumsum(1 - inside, axis=1)
    firsts = scores * tf.cast(candidates - inside, tf.uint32)

    def visit(count: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        highest, starts = tf.math.top_k(firsts, count)
        numbers = tf.gather(tf.reshape(words, [-1]), _flat(starts, length))
        lengths = tf.searchsorted(words, numbers, side="right") - starts
        left, taken = _fill(tf.where(highest > 0, lengths, length + 1), budgets)
        finished = tf.reduce_all((left == 0) | (highest[:, -1] == 0))
        return *_spread(starts, taken, places, length), finished

    positions, chosen, finished = visit(min(length, places + places // 2))
    # Rows whose last words were all too long are rare, but they must be exact too.
    return tf.cond(finished, lambda: (positions, chosen), lambda: visit(length)[:2])


def _fill(lengths: tf.Tensor, budgets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Takes each word that still fits, in order.

    A pass takes words up to the first that does not fit; that one is longer than what is left,
    as are all that were passed over before, so the next pass may look at all words again.

    Returns:
      What is left of the [rows] budgets, and the [rows, count] lengths with 0 for words not taken.
    """
    taken = lengths.dtype.max

    def fitting(waiting: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
        return tf.where(waiting <= left, waiting, 0)

    def take(waiting: tf.Tensor, left: tf.Tensor, fit: tf.Tensor) -> tuple[tf.Tensor, ...]:
        new = fit * tf.cast(tf.cumsum(fit, axis=1) <= left, tf.int32)
        left -= tf.reduce_sum(new, axis=1, keepdims=True)
        waiting = tf.where(new > 0, taken, waiting)
        return waiting, left, fitting(waiting, left)

    start = lengths, budgets[:, None], fitting(lengths, budgets[:, None])
    waiting, left, _ = tf.while_loop(lambda _, left, fit: tf.reduce_any(fit > 0), take, start)
    return left[:, 0], tf.where(waiting == taken, lengths, 0)


def _spread(
    starts: tf.Tensor, lengths: tf.Tensor, places: int, length: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Lists the tokens of words in ascending order, given [rows, count] starts and lengths."""
    packed = tf.where(lengths > 0, (length - starts) * (length + 1) + lengths, 0)
    packed = tf.math.top_k(packed, min(places, packed.shape[1]))[0]
    starts, lengths = length - packed // (length + 1), packed % (length + 1)
    ends = tf.cumsum(lengths, axis=1)
    place = tf.broadcast_to(tf.range(places), [tf.shape(ends)[0], places])
    chosen = tf.cast(place < ends[:, -1:], tf.int32)
    word = tf.searchsorted(ends, place, side="right") * chosen
    offsets = tf.gather(tf.reshape(starts - ends + lengths, [-1]), _flat(word, ends.shape[1]))
    return (offsets + place) * chosen, chosen


def _replacements(
    keys: tf.Tensor, positions: tf.Tensor, labels: tf.Tensor, table: TokenTable
) -> tf.Tensor:
    """Returns what stands in the place of each label: [MASK], itself or any token."""
    row = _mix_64(tf.bitcast(keys, tf.uint64) + _uint_64(1))
    steps = tf.cast(positions + 1, tf.uint64) * _uint_64(GOLDEN_64)
    draws = _mix_64(row[:, None] + steps)
    low = tf.bitwise.bitwise_and(draws, _uint_64(2**32 - 1))
    share = tf.bitwise.right_shift(draws, _uint_64(32))
    # Multiply and shift: no id is more than 1 + vocab_size / 2**32 times as likely as another.
    vocab_size = _uint_64(len(table.kinds))
    any_id = tf.cast(tf.bitwise.right_shift(low * vocab_size, _uint_64(32)), tf.int32)
    other = tf.where(share < _uint_64(round(0.9 * 2**32)), labels, any_id)
    return tf.where(share < _uint_64(round(0.8 * 2**32)), table.mask_id, other)


def _flat(places: tf.Tensor, length: int) -> tf.Tensor:
    """Returns where places in rows of `length` stand in the flattened batch."""
    return places + length * tf.range(tf.shape(places)[0])[:, None]


def _uint_64(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint64)


def _xor_shift(x: tf.Tensor, bits: int) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(bits, x.dtype)))


def _mix_64(x: tf.Tensor) -> tf.Tensor:
    """Returns a one-to-one mixture of 64 bits: the end of splitmix64 (Stafford's mix 13)."""
    x = _xor_shift(x, 30) * _uint_64(0xBF58476D1CE4E5B9)
    x = _xor_shift(x, 27) * _uint_64(0x94D049BB133111EB)
    return _xor_shift(x, 31)
