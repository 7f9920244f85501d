"""WordPiece vocabularies: read, checked, written, applied.

The file format is BERT's: one token a line, the line number counted from zero is the id.
Tokenisation is tensorflow-text's.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_text

from pretraining import files
from pretraining.errors import InputError

UNKNOWN = "[UNK]"
SPECIAL_TOKENS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
LINES_AT_ONCE = 2000


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, in the order of their ids, and the ids that BERT names.

    Attributes:
      tokens: every token; its position is its id.
    """

    tokens: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token."""
        return {token: i for i, token in enumerate(self.tokens)}

    @functools.cached_property
    def sha256(self) -> str:
        """Hexadecimal digest of the vocabulary, whatever the file's line endings were."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    def tokenize(self, lines: Sequence[str], do_lower_case: bool = True) -> list[list[int]]:
        """Returns the token ids of each line.

        Args:
          lines: any text.
          do_lower_case: lower-case the text and strip its accents first.
        """
        ids, lengths = self.tokenize_flat(lines, do_lower_case)
        ids, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def tokenize_flat(
        self, lines: Sequence[str], do_lower_case: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of all lines as one array, much sooner than as lists.

        Args:
          lines: any text.
          do_lower_case: lower-case the text and strip its accents first.

        Returns:
          (ids, lengths): int32 [tokens] and int64 [lines], how many of them belong to each line.
        """
        tokenizer = self._uncased if do_lower_case else self._cased
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for start in range(0, len(lines), LINES_AT_ONCE):
            tokens = tokenizer.tokenize(tf.constant(lines[start : start + LINES_AT_ONCE]))
            ids.append(tokens.flat_values.numpy())
            lengths.append(tokens.row_lengths().numpy())
        return np.concatenate(ids), np.concatenate(lengths)

    @functools.cached_property
    def _uncased(self) -> tensorflow_text.FastBertTokenizer:
        return self._tokenizer(lower_case_nfd_strip_accents=True)

    @functools.cached_property
    def _cased(self) -> tensorflow_text.FastBertTokenizer:
        return self._tokenizer(lower_case_nfd_strip_accents=False)

    def _tokenizer(self, **options: bool) -> tensorflow_text.FastBertTokenizer:
        return tensorflow_text.FastBertTokenizer(
            vocab=list(self.tokens), token_out_type=tf.int32, **options
        )

    def __reduce__(self) -> tuple:
        # The tokenisers above cannot be sent to another process; it makes its own.
        return Vocabulary, (self.tokens,)


def read_vocabulary(path: str, flag: str = "--vocab_file") -> Vocabulary:
    """Reads a vocabulary file in BERT's format.

    Args:
      path: local or gs:// path, UTF-8, one token a line.
      flag: named in the error messages.

    Raises:
      InputError: the file cannot be read, holds a token twice or lacks a special token.
    """
    if tf.io.gfile.isdir(path):
        raise InputError(f"{flag}={path}: expected a file with a token a line. Received: a folder")
    try:
        with tf.io.gfile.GFile(path) as file:  # its lines end, without a word, where reading fails
            lines = file.read().split("\n")
        tokens = tuple(line.rstrip("\r") for line in (lines if lines[-1] else lines[:-1]))
    except UnicodeDecodeError:
        raise InputError(f"{flag}={path}: expected a UTF-8 text file with a token a line") from None
    except tf.errors.OpError as error:
        raise InputError(f"{flag}={path}: {files.why(error, path, 'read')}") from None
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise InputError(
            f"{flag}={path}: expected the tokens {' '.join(SPECIAL_TOKENS)}, a token a line. "
            f"Received: {len(tokens)} lines without {' '.join(missing)}"
        )
    repeated = [t for t, n in collections.Counter(tokens).items() if n > 1 and t]
    if repeated:
        raise InputError(
            f"{flag}={path}: expected every token once. Received: {repeated[0]!r} several times"
        )
    return Vocabulary(tokens)


def check_new_file(path: str, flag: str, overwrite: bool) -> None:
    """Checks that a file can be written, before the work that will fill it.

    Raises:
      InputError: something stands there already, or its folder cannot be made.
    """
    if files.is_file(path, flag) and not overwrite:
        raise InputError(
            f"{flag}={path}: expected a new file, or --overwrite beside it. Received: one that exists"
        )
    if tf.io.gfile.isdir(path):
        raise InputError(f"{flag}={path}: expected the name of a file. Received: a folder")
    folder = path.rpartition("/")[0]
    if folder:
        try:
            files.make_folder(folder)
        except tf.errors.OpError as error:
            raise InputError(f"{flag}={path}: {files.why(error, path, 'written')}") from None


def write_vocabulary(vocabulary: Vocabulary, path: str, flag: str = "--vocab_file") -> None:
    """Writes a vocabulary in BERT's format to a local or gs:// path, whole or not at all.

    Raises:
      InputError: it cannot be written.
    """
    folder, slash, name = path.rpartition("/")
    unfinished = f"{folder}{slash}.{name}.unfinished"
    try:
        with tf.io.gfile.GFile(unfinished, "w") as file:
            file.write("".join(f"{token}\n" for token in vocabulary.tokens))
        tf.io.gfile.rename(unfinished, path, overwrite=True)
    except tf.errors.OpError as error:
        raise InputError(f"{flag}={path}: {files.why(error, path, 'written')}") from None
