"""Formats of text, and documents taken out of the bytes of a block.

This module does without TensorFlow: programs check `FORMATS` before they import it.
"""

import dataclasses
import html
import json
import re
from collections import Counter
from collections.abc import Iterator

from pretraining.errors import InputError

FORMATS = ("auto", "sentences", "paragraphs", "wikiextractor", "jsonl")
# What `--help` of the programs that read text says.
INPUT_HELP = (
    "text: comma-separated files, globs or folders (all files in them), local or gs://; .gz and .bz2 "
    "are decompressed"
)
INPUT_FORMAT_HELP = (
    "sentences: a sentence a line; paragraphs: a paragraph a line; both with a blank line between "
    "documents. wikiextractor: its <doc> elements. jsonl: an object with a text a line. auto: by each "
    "file's first bytes"
)
BLANK_LINE = re.compile(rb"\n[ \t\r\x0b\x0c]*\n")
END_OF_ARTICLE = b"\n</doc>"
_OTHER_SPACE = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_TITLE = re.compile(r'title="(.*)">')


@dataclasses.dataclass(frozen=True)
class Source:
    """A text file.

    Attributes:
      path: local or gs:// path; `.gz` and `.bz2` are decompressed while they are read.
      format: one of `FORMATS`, never "auto".
      size: bytes on disk.
    """

    path: str
    format: str
    size: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive bytes of one file.

    Attributes:
      source: the file.
      data: whole documents, or a piece of a single one that is longer than a block.
      number: the number of the document that goes on here, or the place of the first byte.
      continued: whether a document goes on that began in the block before.
      first_line: the line of the file, counted from 1, in which `data` begins.
    """

    source: Source
    data: bytes
    number: int
    continued: bool
    first_line: int


@dataclasses.dataclass(frozen=True)
class Block:
    """What one task works on: documents of about `block_bytes`, from one file or from several.

    Attributes:
      index: counts the blocks from 0.
      parts: what it is made of, in the order of the files.
      size: bytes of text, markup included.
      lines_are_sentences: whether a line is a sentence, or else a paragraph yet to be split.
    """

    index: int
    parts: tuple[Part, ...]
    size: int
    lines_are_sentences: bool


def documents(block: Block, tally: Counter[str] | None = None) -> Iterator[tuple[int, list[str]]]:
    """Takes a block apart.

    A document's number is the place of its first byte in all the text: unique, ascending, the same
    whatever the size of the blocks. The pieces of a document that was cut have the same number.

    Args:
      block: from `read_blocks`.
      tally: `tally["bad_bytes"]` is raised by the number of places that were no UTF-8 and were
        replaced by U+FFFD.

    Yields:
      (number, lines) for each document that is not blank. Lines are stripped, none is
      empty, and white space outside of ASCII is a plain space: BERT's tokenisers take a no-break
      space for one, tensorflow-text's take it for a letter.

    Raises:
      InputError: a line of a JSON Lines file is no object with a text; names file and line.
    """
    tally = Counter() if tally is None else tally
    take_apart = {"jsonl": _json_documents, "wikiextractor": _articles}
    for part in block.parts:
        for number, text in take_apart.get(part.source.format, _plain_documents)(part, tally):
            if not text.isascii():
                text = _OTHER_SPACE.sub(" ", text)
            lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
            if lines:
                yield part.number if part.continued else number, lines


def leading_space(data: bytes) -> int:
    """How many bytes of white space `data` begins with."""
    return len(data) - len(data.lstrip())


def _decode(data: bytes, tally: Counter[str]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        tally["bad_bytes"] += text.count("\ufffd") - data.count("\ufffd".encode())
        return text


def _plain_documents(part: Part, tally: Counter[str]) -> Iterator[tuple[int, str]]:
    start = 0
    for end, after in [*(m.span() for m in BLANK_LINE.finditer(part.data)), (len(part.data), 0)]:
        document = part.data[start:end]
        yield part.number + start + leading_space(document), _decode(document, tally)
        start = after


def _articles(part: Part, tally: Counter[str]) -> Iterator[tuple[int, str]]:
    start = 0
    for piece in part.data.split(END_OF_ARTICLE):
        number = part.number + start + leading_space(piece)
        start += len(piece) + len(END_OF_ARTICLE)
        text = _decode(piece, tally).lstrip()
        if text.startswith("<doc "):
            header, _, text = text.partition("\n")
            title = _TITLE.search(header)
            first, _, rest = text.lstrip().partition("\n")
            if title and html.unescape(title[1]).strip() == html.unescape(first).strip():
                text = rest
        yield number, text


def _json_documents(part: Part, tally: Counter[str]) -> Iterator[tuple[int, str]]:
    number = part.number
    for line_number, line in enumerate(part.data.split(b"\n"), part.first_line):
        if line.strip():
            yield number, _text_of(line, f"{part.source.path}:{line_number}", tally)
        number += len(line) + 1


def _text_of(line: bytes, where: str, tally: Counter[str]) -> str:
    try:
        value = json.loads(_decode(line, tally))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: expected a JSON object a line. Received: {line[:40]!r} ({error})"
        ) from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(
            f'{where}: expected a JSON object with a string "text". Received: {line[:40]!r}'
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can write
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        tally["bad_bytes"] += whole.count("\ufffd") - text.count("\ufffd")
        return whole
    return text
