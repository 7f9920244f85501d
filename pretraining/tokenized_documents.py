"""Tokenised documents as ranges of one array: put in order, joined, sampled."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents as ranges of one array of tokens.

    Attributes:
      tokens: [tokens] ids of all sentences, one after the other.
      sentences: [sentences + 1] int64, where each sentence begins in `tokens`; none is empty.
      firsts: [documents + 1] int64, the first sentence of each document; none is empty.
      numbers: [documents] int64, which document it is; no number comes twice.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    firsts: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Returns where each of consecutive ranges begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def arrange(
    tokens: np.ndarray, lengths: np.ndarray, documents: np.ndarray, numbers: Sequence[int]
) -> Documents:
    """Drops sentences and documents without tokens, and joins the pieces of a document.

    Args:
      tokens: [tokens] ids of all sentences, one after the other.
      lengths: [sentences] tokens in each.
      documents: [documents] sentences in each.
      numbers: [documents] in ascending order; neighbours of the same number are one document.
    """
    owners = np.repeat(np.asarray(numbers, np.int64), documents)[lengths > 0]
    lengths = lengths[lengths > 0]
    new = np.flatnonzero(np.diff(owners, prepend=-1))
    return Documents(tokens, offsets_of(lengths), np.append(new, len(owners)), owners[new])


def join(first: Documents, second: Documents) -> Documents:
    """Returns the documents of both; their numbers must differ."""
    return Documents(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.sentences, second.sentences[1:] + first.sentences[-1]]),
        np.concatenate([first.firsts, second.firsts[1:] + first.firsts[-1]]),
        np.concatenate([first.numbers, second.numbers]),
    )


def sample(documents: Documents, pieces: int, tokens_each: int) -> Documents:
    """Picks pieces of documents, spread evenly over all their sentences.

    The first and the last document are always among them.

    Args:
      documents: at least one.
      pieces: how many, about; fewer where there are fewer sentences.
      tokens_each: of a piece, at most.

    Returns:
      The pieces; several may have the same number.
    """
    sentences = len(documents.sentences) - 1
    spread = np.linspace(0, sentences, pieces, endpoint=False).astype(np.int64)
    begins = np.union1d(spread, documents.firsts[-2])
    owners = np.searchsorted(documents.firsts, begins, side="right") - 1
    ends = np.minimum(documents.firsts[owners + 1], np.append(begins[1:], sentences))
    tokens, lengths, counts = [], [], []
    for begin, end in zip(begins, ends, strict=True):
        places = documents.sentences[begin : end + 1]
        places = np.unique(np.minimum(places, places[0] + tokens_each))
        tokens.append(documents.tokens[places[0] : places[-1]])
        lengths.append(np.diff(places))
        counts.append(len(places) - 1)
    flat = np.concatenate(tokens)
    starts = offsets_of(np.concatenate(lengths))
    firsts = offsets_of(counts)
    return Documents(flat, starts, firsts, documents.numbers[owners])


def without(documents: Documents, numbers: np.ndarray) -> Documents:
    """Leaves out the documents of some numbers."""
    counts = np.diff(documents.firsts)
    keep = ~np.isin(documents.numbers, numbers)
    kept = np.flatnonzero(np.repeat(keep, counts))
    lengths = np.diff(documents.sentences)
    tokens = documents.tokens[np.repeat(np.repeat(keep, counts), lengths)]
    return Documents(
        tokens,
        offsets_of(lengths[kept]),
        offsets_of(counts[keep]),
        documents.numbers[keep],
    )
