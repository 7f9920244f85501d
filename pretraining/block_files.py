"""From a block of text to a file of its examples, in ascending order of their keys.

A random second segment comes from another document of the block. A block with few documents, or with
a piece of a single one, waits until all blocks are tokenised and borrows pieces of documents from the
blocks around it.
"""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretraining import array_files, corpus, examples
from pretraining.examples import Examples, ExampleSettings
from pretraining.sentence_splitting import split_sentences
from pretraining.tokenized_documents import Documents, arrange, join, sample, without
from pretraining.vocabulary import Vocabulary

FEWEST_DOCUMENTS = 8  # with fewer, a block borrows
LENDING_BLOCKS = 4  # on either side
LENT_PIECES = 32  # of a block
LENT_TOKENS = 1024  # of a piece, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """What examples are made with, the same for all blocks.

    Attributes:
      vocabulary: the tokens.
      do_lower_case: whether text is lower-cased and stripped of accents.
      settings: how examples are cut and masked.
    """

    vocabulary: Vocabulary
    do_lower_case: bool
    settings: ExampleSettings

    @property
    def dtype(self) -> type:
        """The type of token ids in files."""
        return np.uint16 if len(self.vocabulary) <= 1 << 16 else np.int32


def tokenize(
    making: Making,
    documents: Sequence[tuple[int, Sequence[str]]],
    lines_are_sentences: bool,
) -> tuple[Documents, Counter[str]]:
    """Tokenises documents.

    Args:
      making: vocabulary and case.
      documents: (number, lines) of each, in ascending order of the numbers.
      lines_are_sentences: whether a line is a sentence, or else a paragraph yet to be split.

    Returns:
      The documents that hold tokens, and counts of documents, sentences, tokens and unknown ones.
    """
    lines = [line for _, document in documents for line in document]
    counts = np.array([len(document) for _, document in documents], np.int64)
    if not lines_are_sentences:
        split = split_sentences(lines)
        found = np.concatenate([[0], np.cumsum([len(sentences) for sentences in split])])
        ends = np.concatenate([[0], np.cumsum(counts)])
        counts = np.diff(found[ends])
        lines = [sentence for sentences in split for sentence in sentences]
    tokens, lengths = making.vocabulary.tokenize_flat(lines, making.do_lower_case)
    numbers = [number for number, _ in documents]
    arranged = arrange(tokens.astype(making.dtype), lengths, counts, numbers)
    unknown = int(np.count_nonzero(tokens == making.vocabulary.ids["[UNK]"]))
    return arranged, Counter(
        documents=len(arranged),
        sentences=len(arranged.sentences) - 1,
        tokens=len(tokens),
        unknown_tokens=unknown,
    )


def _arrays(documents: Documents, prefix: str) -> dict[str, np.ndarray]:
    return {prefix + f.name: getattr(documents, f.name) for f in dataclasses.fields(Documents)}


def _documents(arrays: dict[str, np.ndarray], prefix: str) -> Documents:
    return Documents(*(arrays[prefix + f.name] for f in dataclasses.fields(Documents)))


def _example_arrays(built: Examples) -> dict[str, np.ndarray]:
    return {
        "keys": built.keys,
        "tokens": built.tokens,
        "starts": np.append(built.starts, len(built.tokens)).astype(np.uint32),
        "a_lengths": built.a_lengths.astype(np.uint16),
        "is_random": built.is_random,
    }


def _build(making: Making, documents: Documents, block: int, own: int) -> Examples:
    ids = making.vocabulary.ids
    return examples.build(documents, making.settings, ids["[CLS]"], ids["[SEP]"], block, own)


def make_block(making: Making, block: corpus.Block, path: str) -> dict[str, Any]:
    """Makes the file of a block: its examples or, where it must borrow, its documents.

    Returns:
      The facts in the file: counts; "numbers", the first and the last number of a document in it,
      absent where nothing in it holds tokens; "borrows".
    """
    tally: Counter[str] = Counter()
    found = list(corpus.documents(block, tally))
    documents, counts = tokenize(making, found, block.lines_are_sentences)
    del found
    return write_block(making, documents, block.index, path, counts + tally)


def write_block(
    making: Making, documents: Documents, block: int, path: str, counts: Counter[str]
) -> dict[str, Any]:
    """Writes the file of a block from its documents; see `make_block`."""
    facts: dict[str, Any] = {**counts, "borrows": 0 < len(documents) < FEWEST_DOCUMENTS}
    arrays = {}
    if len(documents):
        facts["numbers"] = [int(documents.numbers[0]), int(documents.numbers[-1])]
        arrays = _arrays(sample(documents, LENT_PIECES, LENT_TOKENS), "lent_")
    if facts["borrows"]:
        arrays |= _arrays(documents, "own_")
    elif len(documents):
        built = _build(making, documents, block, len(documents))
        arrays |= _example_arrays(built)
        facts["examples"] = len(built.keys)
    array_files.write_arrays(path, arrays, facts)
    return facts


def lenders(facts: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """Tells which blocks lend to which.

    Args:
      facts: of all blocks, in their order.

    Returns:
      For each block that borrows, the nearest blocks before and behind it that hold another
      document; an empty list where none does.
    """
    holding = [i for i, block in enumerate(facts) if "numbers" in block]
    firsts, lasts = ([facts[i]["numbers"][side] for i in holding] for side in (0, 1))
    found = {}
    for i in holding:
        if facts[i]["borrows"]:
            first, last = facts[i]["numbers"]
            before = bisect.bisect_left(firsts, first)
            behind = bisect.bisect_right(lasts, last)
            near = holding[max(0, before - LENDING_BLOCKS) : before]
            found[i] = near + holding[behind : behind + LENDING_BLOCKS]
    return found


def finish_block(
    making: Making, block: int, path: str, lending: Sequence[str], result: str
) -> dict[str, Any]:
    """Makes the examples of a block that borrows.

    Args:
      making: vocabulary and settings.
      block: its index.
      path: its file.
      lending: files of the blocks that lend.
      result: the file to write.

    Returns:
      The facts in the file: "examples".
    """
    own = _documents(array_files.map_arrays(path), "own_")
    together = own
    for other in lending:
        lent = _documents(array_files.map_arrays(other), "lent_")
        together = join(together, without(lent, own.numbers))
    built = _build(making, together, block, len(own))
    facts = {"examples": len(built.keys)}
    array_files.write_arrays(result, _example_arrays(built), facts)
    return facts
