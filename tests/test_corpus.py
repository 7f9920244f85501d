"""Text formats, and blocks of documents cut from them."""

import bz2
import collections
import gzip
import json
import pickle
import random

import pytest

from pretraining import corpus
from pretraining.errors import InputError

WORDS = "the of and river city was born in 1912 naïve 北京 Ωmega don't".split()
BIG = 1 << 20


def made_up_documents(count, seed=0, longest=6):
    """Documents of lines that are two sentences each, all different."""
    rng = random.Random(seed)

    def line():
        return " ".join(
            " ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + f" number {rng.getrandbits(40)}."
            for _ in range(2)
        )

    return [[line() for _ in range(rng.randint(1, longest))] for _ in range(count)]


def plain(documents):
    return "\n\n".join("\n".join(document) for document in documents) + "\n"


def wikiextractor(documents):
    return "".join(
        f'<doc id="{i}" url="https://x.org/wiki?curid={i}" title="A "title" {i}">\n'
        f'A "title" {i}\n\n' + "\n\n".join(document) + "\n\n</doc>\n"
        for i, document in enumerate(documents)
    )


def jsonl(documents):
    return "".join(
        json.dumps({"id": i, "text": "\n\n".join(document)}, ensure_ascii=i % 2 == 0) + "\n"
        for i, document in enumerate(documents)
    )


WRITERS = {
    "sentences": plain,
    "paragraphs": plain,
    "wikiextractor": wikiextractor,
    "jsonl": jsonl,
}
PACKERS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress}


def read(path, text_format, block_bytes=BIG):
    """The documents by number, pieces joined, and the blocks."""
    sources = corpus.find_sources(str(path), text_format)
    blocks = list(corpus.read_blocks(sources, block_bytes))
    assert [block.index for block in blocks] == list(range(len(blocks)))
    documents = collections.defaultdict(list)
    for block in blocks:
        numbers = [number for number, _ in corpus.documents(block)]
        assert len(set(numbers)) == len(numbers)  # a block has a piece of a document once
        for number, lines in corpus.documents(pickle.loads(pickle.dumps(block))):
            assert lines and all(line == line.strip() != "" for line in lines)
            documents[number] += lines
    assert list(documents) == sorted(documents)
    return documents, blocks


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("text_format", WRITERS)
def test_documents_come_out_whatever_the_block_and_the_packing(tmp_path, text_format, packed):
    documents = made_up_documents(60)
    path = tmp_path / f"text{packed}"
    path.write_bytes(PACKERS[packed](WRITERS[text_format](documents).encode()))
    found, blocks = read(path, text_format)
    assert list(found.values()) == documents and len(blocks) == 1
    again, blocks = read(path, text_format, 4000)
    assert again == found and len(blocks) > 5
    assert all(block.size <= 4000 for block in blocks)
    assert all(block.lines_are_sentences == (text_format == "sentences") for block in blocks)


@pytest.mark.parametrize("text_format", ["sentences", "wikiextractor"])
@pytest.mark.parametrize("block_bytes", [64, 301, 1000])
def test_a_document_longer_than_a_block_goes_on_in_the_next(tmp_path, text_format, block_bytes):
    documents = made_up_documents(12, longest=3)
    documents[5] = [line for document in made_up_documents(60, seed=1) for line in document]
    path = tmp_path / "text"
    path.write_text(WRITERS[text_format](documents))
    found, blocks = read(path, text_format, block_bytes)
    assert max(block.size for block in blocks) <= block_bytes
    text = [" ".join(lines).split() for lines in found.values()]
    if text_format == "wikiextractor":
        # A header that a block cannot hold with its title is text like any other.
        text = [
            words[-len(" ".join(d).split()) :] for words, d in zip(text, documents, strict=True)
        ]
    assert text == [" ".join(document).split() for document in documents]


@pytest.mark.parametrize("line", ["word " * 5000, "北京" * 5000, "x" * 20000], ids=lambda x: x[0])
def test_a_line_longer_than_a_block_is_cut_between_words_or_characters(tmp_path, line):
    path = tmp_path / "text"
    path.write_text(f"before\n\n{line}\n\nafter\n")
    tally = collections.Counter()
    blocks = list(corpus.read_blocks(corpus.find_sources(str(path), "sentences"), 1000))
    found = [item for block in blocks for item in corpus.documents(block, tally)]
    assert max(block.size for block in blocks) <= 1000 and not tally
    assert len({number for number, _ in found}) == 3
    pieces = [lines[0] for _, lines in found[1:-1]]
    if " " in line:
        assert {word for piece in pieces for word in piece.split()} == {"word"}
    assert "".join(pieces).replace(" ", "") == line.replace(" ", "")


@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n", b"\n \t \n", b"\n\n\n\n", b"\n\r\n"])
@pytest.mark.parametrize("block_bytes", [*range(9, 20), BIG])
def test_blank_lines_of_any_kind_end_a_document(tmp_path, separator, block_bytes):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + separator.join([b"a b", b"c d e f", b"g", b"h i\nj"]))
    found, _ = read(path, "sentences", block_bytes)
    words = [" ".join(lines) for lines in found.values()]
    assert words == ["a b", "c d e f", "g", "h i j"]
    assert list(found) == list(read(path, "sentences")[0])


def test_bad_bytes_are_replaced_and_counted(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("fine � ".encode() + b"caf\xe9 \xff\n\nno\xc2\xa0break\n")
    tally = collections.Counter()
    (block,) = corpus.read_blocks(corpus.find_sources(str(path), "sentences"), BIG)
    lines = [lines for _, lines in corpus.documents(block, tally)]
    assert lines == [["fine � caf� �"], ["no break"]]
    assert tally["bad_bytes"] == 2


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path):
    path = tmp_path / "text"
    path.write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    found, _ = read(path, "jsonl")
    assert list(found.values()) == [["a � b 😀"]]


@pytest.mark.parametrize(
    "bad", ['{"text": "cut', '["text"]', '{"text": 3}', '{"txt": ""}', "[" * 9999]
)
@pytest.mark.parametrize("block_bytes", [200, BIG])
def test_bad_json_is_named_by_file_and_line(tmp_path, bad, block_bytes):
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(made_up_documents(30)) + "\n" + bad + "\n")
    with pytest.raises(InputError, match=f"^{path}:32: expected a JSON object") as raised:
        read(path, "jsonl", block_bytes)
    assert "\n" not in str(raised.value)


def test_a_line_of_json_may_be_longer_than_a_block_but_not_endless(tmp_path, monkeypatch):
    documents = made_up_documents(5)
    documents[2] *= 50
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(documents))
    found, blocks = read(path, "jsonl", 500)
    assert list(found.values()) == documents and len(blocks) > 3
    monkeypatch.setattr(corpus, "LONGEST_JSON_LINE", 2000)
    with pytest.raises(InputError, match=f"^{path}:3: expected JSON of at most"):
        read(path, "jsonl", 500)


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_several_streams_in_a_file_are_one_text(tmp_path, ending):
    documents = made_up_documents(20)
    path = tmp_path / f"text{ending}"
    halves = plain(documents).encode()
    path.write_bytes(PACKERS[ending](halves[:999]) + PACKERS[ending](halves[999:]))
    assert list(read(path, "sentences", 700)[0].values()) == documents


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "other"])
def test_a_damaged_file_is_named(tmp_path, ending, damage):
    path = tmp_path / f"text{ending}"
    whole = bytearray(PACKERS[ending](plain(made_up_documents(2000)).encode()))
    if damage == "changed":
        whole[len(whole) // 2] ^= 0xFF
    path.write_bytes({"truncated": whole[:-20], "changed": whole, "other": b"plain text"}[damage])
    # What bzip2 makes of a changed byte is handed out before its sum is checked.
    expected = "(a whole|UTF-8 text)" if damage == "changed" else "a whole"
    for text_format in ("sentences", "auto"):
        with pytest.raises(InputError, match=f"^{path}: expected {expected}") as raised:
            read(path, text_format, 10_000)
        assert "\n" not in str(raised.value)


def test_the_format_is_guessed_from_the_first_bytes(tmp_path):
    documents = made_up_documents(30)
    one_a_line = [
        [s for line in d for s in line.replace(". ", ".\n").split("\n")] for d in documents
    ]
    texts = {
        "a.txt": ("paragraphs", plain(documents)),
        "b": ("sentences", "\ufeff" + plain(one_a_line)),
        "c/wiki_00.bz2": ("wikiextractor", wikiextractor(documents)),
        "c/d/e.gz": ("jsonl", jsonl(documents)),
        "f.json": ("jsonl", jsonl([["one line " * 20000]])),
        "g": ("sentences", '{"a": "brace is no json with a text"}\n'),
    }
    for name, (_, text) in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](text.encode()))
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("hidden")
    sources = corpus.find_sources(str(tmp_path), "auto")
    found = {s.path.removeprefix(f"{tmp_path}/"): s.format for s in sources}
    assert found == {name: text_format for name, (text_format, _) in texts.items()}
    assert [s.size for s in sources] == [(tmp_path / name).stat().st_size for name in sorted(texts)]


def test_a_block_holds_many_files_and_progress_reaches_their_size(tmp_path):
    documents = made_up_documents(40)
    for i in range(8):
        (tmp_path / f"{i}").write_text(plain(documents[5 * i : 5 * i + 5]))
    sources = corpus.find_sources(str(tmp_path), "sentences")
    done = []
    (block,) = corpus.read_blocks(sources, BIG, done.append)
    assert [lines for _, lines in corpus.documents(block)] == documents
    assert sum(done) == sum(source.size for source in sources)
    # A block is one or the other, so that its lines can be taken alike.
    mixed = [
        corpus.Source(s.path, corpus.FORMATS[1 + i % 2], s.size) for i, s in enumerate(sources)
    ]
    blocks = list(corpus.read_blocks(mixed, BIG))
    assert [block.lines_are_sentences for block in blocks] == [True, False] * 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["expected text", "empty"]),
        (b" \n\n\t\n", ["expected text", "white space"]),
        ("text".encode("utf-16"), ["expected UTF-8 text"]),
        (None, ["no file matches"]),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, words):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    for text_format in ("auto", "sentences"):
        with pytest.raises(InputError) as raised:
            read(path, text_format)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert all(word in str(raised.value) for word in words)
