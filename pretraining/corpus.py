"""Text in five formats, read as a stream and cut into blocks of whole documents.

The reading process looks for the ends of documents in the bytes, nothing more; `documents` does the
rest in the processes that work on the blocks. Memory stays bounded whatever the input: a document
that is longer than a block goes on in the next one.
"""

import concurrent.futures
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from pretraining import files, text_formats, text_streams
from pretraining.errors import InputError
from pretraining.sentence_splitting import split_sentences
from pretraining.text_formats import FORMATS, Block, Part, Source, documents

__all__ = ["FORMATS", "Block", "Part", "Source", "documents", "find_sources", "read_blocks"]

SENTENCES_IN_A_LINE = 1.5  # with more than that, lines are paragraphs
LONGEST_JSON_LINE = 64 << 20  # bytes: a line of JSON cannot be cut
THREADS = 16  # requests at once to look at files
_BOM = b"\xef\xbb\xbf"


def find_sources(patterns: str, text_format: str, flag: str = "--input") -> list[Source]:
    """Finds the text files that a flag names.

    Args:
      patterns: comma-separated files, globs or folders; a folder stands for all files in it and in
        its folders, hidden ones left out.
      text_format: one of `FORMATS`; "auto" is decided for each file by its first bytes.
      flag: named in the error messages.

    Returns:
      The files that are not empty, ordered by path.

    Raises:
      InputError: a pattern matches nothing, a file cannot be read, or all are empty.
    """
    paths = files.find_files(patterns, flag, in_folder="*", recursive=True)

    def look(path: str) -> Source | None:
        with text_streams.errors_named(path):
            size = tf.io.gfile.stat(path).length
            if not size:
                return None
            return Source(path, _guess_format(path) if text_format == "auto" else text_format, size)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        sources = [source for source in pool.map(look, paths) if source]
    if not sources:
        raise InputError(f"{flag}={patterns}: expected text. Received: {len(paths)} empty files")
    return sources


def _guess_format(path: str) -> str:
    with text_streams.open_text(path) as stream:
        sample = stream.read(text_streams.SAMPLE_BYTES)
    text_streams.refuse_binary(path, sample)
    start = sample.removeprefix(_BOM).lstrip()
    if start.startswith(b"<doc "):
        return "wikiextractor"
    if start.startswith(b"{") and b'"text"' in start:
        line, newline, _ = start.partition(b"\n")
        with contextlib.suppress(ValueError, RecursionError):
            # A line that the sample does not hold to its end cannot be parsed.
            if not newline or isinstance(json.loads(line)["text"], str):
                return "jsonl"
    lines = [line for line in start.decode("utf-8", "replace").split("\n") if line.strip()]
    sentences = sum(map(len, split_sentences(lines)))
    return "paragraphs" if sentences > SENTENCES_IN_A_LINE * len(lines) else "sentences"


def read_blocks(
    sources: Sequence[Source],
    block_bytes: int,
    on_progress: Callable[[int], None] = lambda size: None,
) -> Iterator[Block]:
    """Reads files as a stream and cuts them into blocks.

    The blocks depend on the files and on `block_bytes` alone. A document longer than `block_bytes`
    is cut at the end of a line, else at a space, else between two characters; its pieces stand in
    consecutive blocks.

    Args:
      sources: the files, in the order in which they are read.
      block_bytes: bytes of text in a block at most; only a longer line of JSON exceeds it.
      on_progress: called with the bytes on disk that were read since the last call.

    Yields:
      Blocks, numbered from 0.

    Raises:
      InputError: a file cannot be read, is damaged or holds no text, or none holds any.
    """
    index, parts, size = 0, [], 0
    for part in _all_parts(sources, block_bytes, on_progress):
        same_kind = not parts or _has_sentences(parts[0]) == _has_sentences(part)
        full = part.continued or size + len(part.data) > block_bytes
        if parts and (full or not same_kind):
            yield Block(index, tuple(parts), size, _has_sentences(parts[0]))
            index, parts, size = index + 1, [], 0
        parts.append(part)
        size += len(part.data)
    if not parts:
        raise InputError(
            f"{sources[0].path if sources else '--input'}: expected text. Received: nothing but "
            f"white space, in {len(sources)} files"
        )
    yield Block(index, tuple(parts), size, _has_sentences(parts[0]))


def _has_sentences(part: Part) -> bool:
    return part.source.format == "sentences"


def _all_parts(sources, block_bytes, on_progress) -> Iterator[Part]:
    place = 0  # of the file's first byte in all the text
    for source in sources:
        with (
            text_streams.errors_named(source.path),
            text_streams.open_text(source.path, on_progress) as stream,
        ):
            splitter = _Splitter(source, stream, block_bytes, place)
            for part in splitter.parts():
                if not part.data.isspace():
                    yield part
            place = splitter.place


class _Splitter:
    """Cuts one file into parts of at most `block_bytes`.

    Attributes:
      place: of the next part's first byte in all the text.
    """

    def __init__(self, source: Source, stream, block_bytes: int, place: int) -> None:
        self.place = place
        self._source = source
        self._stream = stream
        self._block_bytes = block_bytes
        self._line = 1

    def parts(self) -> Iterator[Part]:
        buffer = self._stream.read(self._block_bytes)
        text_streams.refuse_binary(self._source.path, buffer)
        if buffer.startswith(_BOM):
            buffer, self.place = buffer[len(_BOM) :], self.place + len(_BOM)
        going_on = None  # the number of the document that was cut
        while True:
            buffer += self._stream.read(self._block_bytes - len(buffer))
            if not buffer:
                return
            ended = len(buffer) < self._block_bytes
            continued, number = going_on is not None, going_on
            if not continued:
                number = self.place
                cut = len(buffer) if ended else self._last_end(buffer)
            else:
                cut = self._first_end(buffer) or (len(buffer) if ended else 0)
            if cut:
                going_on = None
            elif self._source.format == "jsonl":
                buffer, cut = self._rest_of_line(buffer)
            else:
                going_on = number if continued else self.place + text_formats.leading_space(buffer)
                cut = _break(buffer)
            data, buffer = buffer[:cut], buffer[cut:]
            yield Part(self._source, data, number, continued, self._line)
            self.place += cut
            self._line += data.count(b"\n")

    def _last_end(self, buffer: bytes) -> int:
        """The place behind the last document that ends in `buffer`, 0 where none does."""
        if self._source.format == "jsonl":
            return buffer.rfind(b"\n") + 1
        if self._source.format == "wikiextractor":
            found = buffer.rfind(text_formats.END_OF_ARTICLE)
            return found + len(text_formats.END_OF_ARTICLE) if found >= 0 else 0
        for blank_line in (b"\n\n", b"\n\r\n"):
            found = buffer.rfind(blank_line)
            if found >= 0:
                return found + len(blank_line)
        found = text_formats.BLANK_LINE.search(buffer[::-1])
        return len(buffer) - found.start() if found else 0

    def _first_end(self, buffer: bytes) -> int:
        if self._source.format == "wikiextractor":
            found = buffer.find(text_formats.END_OF_ARTICLE)
            return found + len(text_formats.END_OF_ARTICLE) if found >= 0 else 0
        found = text_formats.BLANK_LINE.search(buffer)
        return found.end() if found else 0

    def _rest_of_line(self, buffer: bytes) -> tuple[bytes, int]:
        buffer += self._stream.readline(LONGEST_JSON_LINE)
        if len(buffer) >= LONGEST_JSON_LINE and not buffer.endswith(b"\n"):
            raise InputError(
                f"{self._source.path}:{self._line}: expected JSON of at most "
                f"{LONGEST_JSON_LINE >> 20} MiB a line. Received: a longer line"
            )
        return buffer, len(buffer)


def _break(buffer: bytes) -> int:
    """Where to cut a document that is longer than a block.

    Before the line's end, not behind it, so that a blank line is never cut in half.
    """
    cut = buffer.rfind(b"\n", 1)
    if cut < 0:
        cut = buffer.rfind(b" ", 1)
    if cut < 0:
        cut = len(buffer)
        # At most three bytes of a character follow its first one.
        while cut > max(1, len(buffer) - 4) and buffer[cut - 1] & 0xC0 == 0x80:
            cut -= 1
        if cut > 1 and buffer[cut - 1] >= 0xC0:
            cut -= 1
    return cut
