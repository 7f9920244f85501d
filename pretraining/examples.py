"""From tokenised documents to pairs of segments for BERT's two tasks.

The procedure is that of Devlin et al., "BERT" (arXiv 1810.04805, section 3.1 and appendix A.2) and of
google-research/bert `create_pretraining_data.py`, function `create_instances_from_document`:
consecutive sentences fill two segments; in half of the examples the second one comes from another
document. Sentences are ranges of one flat array of tokens, so a segment is a range too, and the loop
over examples handles a few numbers for each.
"""

import array
import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pretraining import masking, record_rows, tokenized_documents
from pretraining.record_rows import serialize
from pretraining.tokenized_documents import Documents, offsets_of
from pretraining.vocabulary import Vocabulary

__all__ = ["serialize"]
GATHERED_AT_ONCE = 1 << 14  # examples
DRAWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How examples are cut and masked; the defaults are BERT's.

    Attributes:
      max_seq_length: tokens in an example, the three special ones included.
      max_predictions_per_seq: the most tokens to predict in an example.
      masked_lm_prob: the part of the tokens to predict.
      do_whole_word_mask: whether the pieces of a word are masked together.
      short_seq_prob: the part of the documents that is cut into shorter examples.
      dupe_factor: how often each document is used, with other cuts and masks each time.
      random_seed: source of every choice.
    """

    max_seq_length: int = 128
    max_predictions_per_seq: int = 20
    masked_lm_prob: float = 0.15
    do_whole_word_mask: bool = False
    short_seq_prob: float = 0.1
    dupe_factor: int = 1
    random_seed: int = 12345

    @property
    def masks(self) -> masking.MaskSettings:
        """The part that masking needs."""
        return masking.MaskSettings(
            masked_lm_prob=self.masked_lm_prob,
            max_predictions_per_seq=self.max_predictions_per_seq,
            do_whole_word_mask=self.do_whole_word_mask,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples in ascending order of their keys, which is a random order.

    Attributes:
      keys: [examples] uint64, the random number of each; order and masks follow from it.
      tokens: [tokens] ids of all examples: [CLS] A [SEP] B [SEP] [CLS] A ...
      starts: [examples] int64, where each example begins in `tokens`.
      lengths: [examples] int64, tokens of each.
      a_lengths: [examples] int64, tokens in segment A.
      is_random: [examples] bool, whether B is from another document.
    """

    keys: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    a_lengths: np.ndarray
    is_random: np.ndarray

    def rows(self, chunk: slice, max_seq_length: int) -> record_rows.Rows:
        """Lays some of the examples out as padded rows without masks."""
        return record_rows.pad(
            self.tokens,
            self.starts[chunk],
            self.lengths[chunk],
            self.a_lengths[chunk],
            self.is_random[chunk],
            max_seq_length,
        )


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1); one at a time from NumPy would take most of the program's time."""
    while True:
        yield from rng.random(DRAWS_AT_ONCE).tolist()


def _cut(
    documents: Documents, count: int, settings: ExampleSettings, rng: np.random.Generator
) -> np.ndarray:
    """Cuts documents into pairs of segments, not yet truncated.

    Args:
      documents: at least two.
      count: how many of them, from the first on, are cut; all supply random second segments.
      settings: lengths and probabilities.
      rng: source of every choice.

    Returns:
      [pairs, 5] int64: begin and end of A and of B in `tokens`, whether B is random.
    """
    room = settings.max_seq_length - 3  # [CLS], [SEP] and [SEP]
    begin, firsts = documents.sentences.tolist(), documents.firsts.tolist()
    pairs, draw = array.array("q"), _uniform(rng).__next__
    for index in range(count):
        start, last = firsts[index], firsts[index + 1]
        target = room if draw() >= settings.short_seq_prob else 2 + int(draw() * (room - 1))
        while start < last:
            # Sentences until the target is reached or the document ends.
            end = bisect.bisect_left(begin, begin[start] + target, start + 1, last)
            split = start + 1 + int(draw() * (end - start - 1))
            is_random = end - start == 1 or draw() < 0.5
            if is_random:
                other = int(draw() * (len(firsts) - 2))
                other += other >= index
                b_start = firsts[other] + int(draw() * (firsts[other + 1] - firsts[other]))
                b_target = target - (begin[split] - begin[start])
                b_end = bisect.bisect_left(
                    begin, begin[b_start] + b_target, b_start + 1, firsts[other + 1]
                )
                end = split  # the sentences that were not used come again
            else:
                b_start, b_end = split, end
            pairs.extend((begin[start], begin[split], begin[b_start], begin[b_end], is_random))
            start = end
    return np.array(pairs, np.int64).reshape(-1, 5)


def _truncate(pairs: np.ndarray, room: int, rng: np.random.Generator) -> np.ndarray:
    """Shortens the longer segment token by token, at either end, until both fit together.

    B is the longer one where both are equally long. So how many tokens each loses is known, and
    how many of them in front is binomial.

    Args:
      pairs: [pairs, 5] from `_cut`.
      room: tokens for both segments.
      rng: source of the ends.

    Returns:
      [pairs, 5], none of the segments empty.
    """
    a_begin, a_end, b_begin, b_end, is_random = pairs.T
    a, b = a_end - a_begin, b_end - b_begin
    excess = np.maximum(a + b - room, 0)
    uneven = np.minimum(excess, abs(a - b))  # until both are equally long
    a_lost = np.where(a > b, uneven, 0) + (excess - uneven) // 2
    b_lost = excess - a_lost
    a_front, b_front = rng.binomial(a_lost, 0.5), rng.binomial(b_lost, 0.5)
    a_begin, a_end = a_begin + a_front, a_end - (a_lost - a_front)
    b_begin, b_end = b_begin + b_front, b_end - (b_lost - b_front)
    return np.stack([a_begin, a_end, b_begin, b_end, is_random], axis=1)


def _gather(tokens: np.ndarray, pairs: np.ndarray, cls: int, sep: int, out: np.ndarray) -> None:
    """Writes [CLS] A [SEP] B [SEP] of each pair to `out`, one after the other."""
    extended = np.append(tokens, np.array([cls, sep], tokens.dtype))
    cls_at, sep_at = len(tokens), len(tokens) + 1
    place = 0
    for first in range(0, len(pairs), GATHERED_AT_ONCE):
        a_begin, a_end, b_begin, b_end, _ = pairs[first : first + GATHERED_AT_ONCE].T
        begins = np.empty((len(a_begin), 5), np.int64)
        lengths = np.ones((len(a_begin), 5), np.int64)
        begins[:, 0], begins[:, 2], begins[:, 4] = cls_at, sep_at, sep_at
        begins[:, 1], begins[:, 3] = a_begin, b_begin
        lengths[:, 1], lengths[:, 3] = a_end - a_begin, b_end - b_begin
        lengths = lengths.ravel()
        offsets = offsets_of(lengths)
        indices = np.arange(offsets[-1]) + np.repeat(begins.ravel() - offsets[:-1], lengths)
        out[place : place + len(indices)] = extended[indices]
        place += len(indices)


def build(
    documents: Documents,
    settings: ExampleSettings,
    cls: int,
    sep: int,
    block: int = 0,
    own: int | None = None,
) -> Examples:
    """Makes the examples of documents, those of all duplicates.

    Args:
      documents: at least two.
      settings: lengths, probabilities and the seed.
      cls: id of [CLS].
      sep: id of [SEP].
      block: the examples depend on the seed, on this number, and on the documents alone.
      own: how many documents, from the first on, are cut; the rest only supplies random second
        segments. None for all.
    """
    if len(documents) < 2:
        raise ValueError(f"expected at least two documents. Received: {len(documents)}")
    cut, keys = [], []
    for duplicate in range(settings.dupe_factor):
        seeds = np.random.SeedSequence([settings.random_seed, block, duplicate])
        rng = np.random.Generator(np.random.Philox(seeds))
        pairs = _cut(documents, len(documents) if own is None else own, settings, rng)
        cut.append(_truncate(pairs, settings.max_seq_length - 3, rng))
        keys.append(rng.integers(2**64 - 1, size=len(pairs), dtype=np.uint64, endpoint=True))
    key, pairs = np.concatenate(keys), np.concatenate(cut)
    order = np.argsort(key, kind="stable")
    key, pairs = key[order], pairs[order]
    a_lengths = pairs[:, 1] - pairs[:, 0]
    lengths = a_lengths + pairs[:, 3] - pairs[:, 2] + 3
    starts = offsets_of(lengths)
    tokens = np.empty(starts[-1], documents.tokens.dtype)
    _gather(documents.tokens, pairs, cls, sep, tokens)
    return Examples(key, tokens, starts[:-1], lengths, a_lengths, pairs[:, 4].astype(bool))


def build_examples(
    documents: Sequence[Sequence[Sequence[int]]],
    vocabulary: Vocabulary,
    settings: ExampleSettings,
    seed: int,
) -> Iterator[dict[str, list]]:
    """Yields masked examples in random order, under the feature names of the original records.

    Args:
      documents: token ids per document and sentence, at least two documents.
      vocabulary: supplies the special tokens and the random replacements.
      settings: lengths and probabilities.
      seed: source of every choice, instead of that of the settings.
    """
    sentences = [sentence for document in documents for sentence in document]
    arranged = tokenized_documents.arrange(
        np.array([token for sentence in sentences for token in sentence], np.int32),
        np.array([len(sentence) for sentence in sentences], np.int64),
        np.array([len(document) for document in documents], np.int64),
        range(len(documents)),
    )
    settings = dataclasses.replace(settings, random_seed=seed)
    built = build(arranged, settings, vocabulary.ids["[CLS]"], vocabulary.ids["[SEP]"])
    mask = record_rows.masker(vocabulary, settings.masks, settings.max_seq_length)
    for first in range(0, len(built.keys), record_rows.ROWS_AT_ONCE):
        chunk = slice(first, first + record_rows.ROWS_AT_ONCE)
        rows = built.rows(chunk, settings.max_seq_length)
        features = {name: v.tolist() for name, v in mask(rows, built.keys[chunk]).items()}
        for values in zip(*features.values(), strict=True):
            yield dict(zip(features, values, strict=True))
