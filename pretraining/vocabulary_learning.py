"""WordPiece vocabularies learnt from text: words counted, pieces merged, the useful ones kept.

Words are counted as tensorflow-text's BERT tokeniser splits them. SentencePiece's byte-pair
encoding (Sennrich et al., arXiv 1508.07909) proposes more pieces than are needed; those stay that
the greedy longest-match tokeniser of BERT uses most.
"""

import collections
import io
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tensorflow as tf
from tensorflow_text.python.ops.bert_tokenizer import BasicTokenizer

from pretraining.errors import InputError
from pretraining.text_formats import Block, documents
from pretraining.vocabulary import SPECIAL_TOKENS, UNKNOWN, Vocabulary

CHUNKS = 250_000  # distinct strings between white space, counted before they are split into words
CHUNK_BYTES = 64 << 20  # and their length in all: Chinese has little white space
CHUNKS_AT_ONCE = 20_000
DISTINCT_WORDS = 600_000  # more than that, and the rarer half is forgotten
WORDS_TO_LEARN = 200_000  # the most frequent ones
UNIQUE_CHARACTERS = 1000  # as in tensorflow-text's learner
LONGEST_WORD = 100  # bytes: a longer word is [UNK] to the tokeniser
LONGEST_PIECE = 50  # characters
PROPOSED = 1.25  # pieces that byte-pair encoding proposes for each that is kept
PART_FOR_CHARACTERS = 0.75  # of the vocabulary, where the characters would not fit

_FIRST, _INNER = 0xF0000, 0x100000  # private code points: a word's first character, the others


class WordCounter:
    """Counts words in bounded memory.

    Where there are more than `DISTINCT_WORDS` of them, the rarer half is forgotten, by count and
    then by alphabet, so counts below a few are lower bounds in a text of many gigabytes. Counts
    that fit do not depend on the order of the text.

    Args:
      do_lower_case: as the tokeniser will do it; accents go as well.

    Attributes:
      forgotten: how many of the words that came were forgotten since.
    """

    def __init__(self, do_lower_case: bool = True) -> None:
        self.forgotten = 0
        self._splitter = BasicTokenizer(lower_case=do_lower_case)
        self._chunks: collections.Counter[bytes] = collections.Counter()
        self._chunk_bytes = 0
        self._words: collections.Counter[bytes] = collections.Counter()

    def add(self, lines: Sequence[str]) -> None:
        """Counts the words of some lines."""
        text = "\n".join(lines).encode()
        # A tenth of the time: most strings between white space come again and again.
        self._chunks.update(text.split())
        self._chunk_bytes += len(text)
        if len(self._chunks) > CHUNKS or self._chunk_bytes > CHUNK_BYTES:
            self._chunk_bytes = sum(map(len, self._chunks))
            if len(self._chunks) > CHUNKS or self._chunk_bytes > CHUNK_BYTES / 2:
                self._split_chunks()

    def counts(self) -> collections.Counter[str]:
        """Returns how often each word came since the last call."""
        self._split_chunks()
        counts: collections.Counter[str] = collections.Counter()
        while self._words:  # never in memory twice
            word, count = self._words.popitem()
            counts[word.decode()] = count
        return counts

    def _split_chunks(self) -> None:
        chunks, counts = list(self._chunks), np.fromiter(self._chunks.values(), np.int64)
        self._chunks.clear()
        self._chunk_bytes = 0
        for start in range(0, len(chunks), CHUNKS_AT_ONCE):
            words = self._splitter.tokenize(tf.constant(chunks[start : start + CHUNKS_AT_ONCE]))
            lengths = words.row_lengths().numpy()
            weights = np.repeat(counts[start : start + CHUNKS_AT_ONCE], lengths).tolist()
            for word, count in zip(words.flat_values.numpy().tolist(), weights, strict=True):
                self._words[word] += count
            if len(self._words) > DISTINCT_WORDS:
                self._forget()

    def _forget(self) -> None:
        ordered = sorted(self._words.items(), key=_most_frequent_first)
        kept, gone = ordered[: DISTINCT_WORDS // 2], ordered[DISTINCT_WORDS // 2 :]
        self._words = collections.Counter(dict(kept))
        self.forgotten += sum(count for _, count in gone)


def _most_frequent_first(item: tuple) -> tuple:
    return -item[1], item[0]


def count_words(lines: Sequence[str], do_lower_case: bool = True) -> collections.Counter[str]:
    """Counts the words of `lines` as BERT's tokeniser splits them."""
    counter = WordCounter(do_lower_case)
    counter.add(lines)
    return counter.counts()


def count_blocks(
    blocks: Iterable[Block], do_lower_case: bool, tally: collections.Counter[str]
) -> collections.Counter[str]:
    """Counts the words of a text.

    Args:
      blocks: from `corpus.read_blocks`.
      do_lower_case: lower-case the text and strip its accents first.
      tally: gets "documents", "words", "forgotten" words and "bad_bytes".

    Raises:
      InputError: there are none, or the text cannot be read.
    """
    counter = WordCounter(do_lower_case)
    for block in blocks:
        texts = list(documents(block, tally))
        tally["documents"] += len(texts) - block.parts[0].continued
        counter.add([line for _, lines in texts for line in lines])
    counts = counter.counts()
    tally["forgotten"] = counter.forgotten
    tally["words"] = counts.total() + counter.forgotten
    if not counts:
        raise InputError("--input: expected text. Received: no words at all")
    return counts


def learn_vocabulary(word_counts: collections.Counter[str], size: int) -> Vocabulary:
    """Learns a WordPiece vocabulary; the same counts give the same vocabulary, in any order.

    The characters are the 1000 most frequent ones. Where they would not fit, the rarest go until
    the others take three quarters of the vocabulary.

    Args:
      word_counts: how often each word occurs in the training text.
      size: the number of tokens; there are fewer where the text does not have that many.

    Returns:
      The special tokens, the characters by code point, then pieces of words by frequency.
    """
    ordered = sorted(word_counts.items(), key=_most_frequent_first)
    ordered = [item for item in ordered if len(item[0].encode()) <= LONGEST_WORD]
    characters = _characters(ordered, size)
    alphabet = {token.removeprefix("##") for token in characters}
    words = [item for item in ordered if alphabet.issuperset(item[0])][:WORDS_TO_LEARN]
    known = {*SPECIAL_TOKENS, *characters}
    room = size - len(known)
    pieces = [p for p in _propose(words, len(known) + int(PROPOSED * room)) if p not in known]
    uses = _count_uses(words, known.union(pieces))
    pieces.sort(key=lambda piece: (-uses[piece], piece))
    return Vocabulary((*SPECIAL_TOKENS, *characters, *pieces[:room]))


def _characters(words: Iterable[tuple[str, int]], size: int) -> list[str]:
    """The characters as tokens, alone and, unless the tokeniser splits them off, inside a word."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in words:
        for character in word:
            counts[character] += count
    # A file of a token a line cannot hold white space: readers strip it.
    frequent = [c for c, _ in sorted(counts.items(), key=_most_frequent_first) if not c.isspace()]
    frequent = frequent[:UNIQUE_CHARACTERS]
    split = BasicTokenizer().tokenize(tf.constant([f"a{c}" for c in frequent] or ["a"]))
    forms = [
        [c] if length > 1 else [c, f"##{c}"]
        for c, length in zip(frequent, split.row_lengths().numpy(), strict=False)
    ]
    room = size - len(SPECIAL_TOKENS)
    if sum(map(len, forms)) > room:
        while sum(map(len, forms)) > PART_FOR_CHARACTERS * room:
            forms.pop()
    first = sorted(form[0] for form in forms)
    return first + sorted(form[1] for form in forms if len(form) > 1)


def _propose(words: Sequence[tuple[str, int]], size: int) -> list[str]:
    """Byte-pair encoding of words.

    A character is one private code point at the start of a word and another one inside it. So what
    SentencePiece joins are WordPiece's pieces, and none of its own rules on text gets in the way.
    """
    alphabet = sorted({character for word, _ in words for character in word})
    if not alphabet:
        return []
    first = {ord(c): _FIRST + i for i, c in enumerate(alphabet)}
    inner = {ord(c): _INNER + i for i, c in enumerate(alphabet)}
    lines = (f"{w[0].translate(first)}{w[1:].translate(inner)}\t{count}" for w, count in words)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        vocab_size=size + 2 * len(alphabet) + 1,
        hard_vocab_limit=False,
        max_sentencepiece_length=LONGEST_PIECE,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = []
    for i in range(1, processor.get_piece_size()):
        places = [ord(character) for character in processor.id_to_piece(i)]
        text = "".join(alphabet[p - (_INNER if p >= _INNER else _FIRST)] for p in places)
        pieces.append(f"##{text}" if places[0] >= _INNER else text)
    return pieces


def _count_uses(words: Iterable[tuple[str, int]], tokens: set[str]) -> collections.Counter[str]:
    """How often the tokeniser uses each token: the longest one that fits, from left to right."""
    uses: collections.Counter[str] = collections.Counter()
    longest = max(map(len, tokens))
    for word, count in words:
        start, prefix = 0, ""
        while start < len(word):
            end = min(len(word), start + longest)
            while end > start and prefix + word[start:end] not in tokens:
                end -= 1
            if end == start:  # a word that the tokeniser would have split
                break
            uses[prefix + word[start:end]] += count
            start, prefix = end, "##"
    return uses


def measure(
    vocabulary: Vocabulary, word_counts: collections.Counter[str], do_lower_case: bool = True
) -> tuple[float, float]:
    """Returns (tokens per word, part of the words that are unknown) of a text."""
    words, tokens, unknown = list(word_counts), 0, 0
    counts = np.fromiter(word_counts.values(), np.int64)
    for start in range(0, len(words), CHUNKS_AT_ONCE):
        batch = words[start : start + CHUNKS_AT_ONCE]
        ids, lengths = vocabulary.tokenize_flat(batch, do_lower_case)
        weights = counts[start : start + CHUNKS_AT_ONCE]
        tokens += int(weights @ lengths)
        unknown += int(np.repeat(weights, lengths)[ids == vocabulary.ids[UNKNOWN]].sum())
    total = int(counts.sum())
    return tokens / total, unknown / total
