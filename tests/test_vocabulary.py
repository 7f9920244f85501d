"""Vocabularies: learnt, written, read, applied; and `python -m pretraining.make_vocab`."""

import collections
import gzip
import pickle
import random

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text
from official.nlp.tools import tokenization
from tensorflow_text.python.ops.bert_tokenizer import BasicTokenizer
from tensorflow_text.tools.wordpiece_vocab import bert_vocab_from_dataset

from pretraining import found_text, make_vocab, vocabulary, vocabulary_learning
from pretraining.errors import InputError

SPECIAL = vocabulary.SPECIAL_TOKENS


@pytest.fixture(scope="module")
def sentences():
    return [p for _, document in found_text.find_documents(150_000) for p in document]


@pytest.fixture(scope="module")
def word_counts(sentences):
    return vocabulary_learning.count_words(sentences)


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_words_are_counted_as_berts_tokenizers_split_them(sentences, do_lower_case, monkeypatch):
    # The original BERT keeps a character of three points whole.
    lines = [line.replace("…", "...") for line in sentences]
    lines += ["Don't panic: Café, CAFE!", "北京 was—naïve; [MASK] a\tb", "$5^2 İstanbul"]
    official = tokenization.BasicTokenizer(do_lower_case=do_lower_case)
    expected = collections.Counter(w for line in lines for w in official.tokenize(line))
    words = BasicTokenizer(lower_case=do_lower_case).tokenize(tf.constant(lines)).flat_values
    assert expected == collections.Counter(w.decode() for w in words.numpy())
    assert vocabulary_learning.count_words(lines, do_lower_case) == expected
    monkeypatch.setattr(vocabulary_learning, "CHUNKS", 500)
    counter = vocabulary_learning.WordCounter(do_lower_case)
    for line in lines:
        counter.add([line])
    assert counter.counts() == expected and not counter.forgotten


def test_frequent_words_stay_exact_where_memory_is_short(sentences, word_counts, monkeypatch):
    monkeypatch.setattr(vocabulary_learning, "CHUNKS", 500)
    monkeypatch.setattr(vocabulary_learning, "DISTINCT_WORDS", 1500)
    counter = vocabulary_learning.WordCounter()
    for line in sentences:
        counter.add([line])
    counts = counter.counts()
    assert len(counts) <= 1500 < len(word_counts)
    assert counts.total() + counter.forgotten == word_counts.total()
    assert all(count <= word_counts[word] for word, count in counts.items())
    frequent = [word for word, _ in word_counts.most_common(50)]
    assert [counts[word] for word in frequent] == [word_counts[word] for word in frequent]


def quality(words, counts):
    """(tokens per word, part of the words unknown), by the tokeniser of the original BERT."""
    tokenizer = tokenization.WordpieceTokenizer(words.ids, max_input_chars_per_word=100)
    tokens = unknown = 0
    for word, count in counts.items():
        pieces = tokenizer.tokenize(word)
        tokens += count * len(pieces)
        unknown += count * (pieces == ["[UNK]"])
    return tokens / counts.total(), unknown / counts.total()


def test_a_learnt_vocabulary_is_as_good_as_tensorflow_texts(sentences):
    """On the text that it was learnt from and on other text."""
    train, unseen = sentences[::2], sentences[1::2]
    theirs = vocabulary.Vocabulary(
        tuple(
            bert_vocab_from_dataset.bert_vocab_from_dataset(
                tf.data.Dataset.from_tensor_slices(train).batch(1000),
                vocab_size=1200,
                reserved_tokens=list(SPECIAL),
                bert_tokenizer_params={"lower_case": True},
                learn_params={"lower_thresh": 1},
            )
        )
    )
    ours = vocabulary_learning.learn_vocabulary(vocabulary_learning.count_words(train), len(theirs))
    assert len(ours) == len(theirs) > 900
    for lines in (train, unseen):
        counts = vocabulary_learning.count_words(lines)
        (our_length, our_unknown), (length, unknown) = (
            quality(ours, counts),
            quality(theirs, counts),
        )
        assert our_length < 1.02 * length
        assert our_unknown <= 1.02 * unknown
        measured = vocabulary_learning.measure(ours, counts)
        np.testing.assert_allclose(measured, (our_length, our_unknown), rtol=1e-9)


def test_counts_decide_which_pieces_are_learnt():
    # Each letter is needed; beyond them there is room for one piece.
    for one, other in ((1000, 10), (10, 1000)):
        counts = collections.Counter({"abab": one, "cdcd": other, "ad": 1, "bc": 1})
        (learnt,) = vocabulary_learning.learn_vocabulary(counts, 5 + 8 + 1).tokens[-1:]
        assert set(learnt.removeprefix("##")) == set("ab" if one > other else "cd")


@pytest.mark.parametrize("size", [200, 999, 2000, 3001])
def test_a_vocabulary_has_the_size_that_was_asked_for(word_counts, size):
    words = vocabulary_learning.learn_vocabulary(word_counts, size)
    assert len(words) == len(set(words.tokens)) == size
    assert words.tokens[:5] == SPECIAL
    for token in words.tokens[5:]:
        assert any(token.removeprefix("##") in word for word in word_counts)
        assert token == token.strip() != "##"


def test_a_vocabulary_is_smaller_where_the_text_has_fewer_pieces():
    words = vocabulary_learning.learn_vocabulary(
        collections.Counter({"ab": 3, "aa": 1, "!": 2}), 100
    )
    assert words.tokens[:5] == SPECIAL
    # A mark is a word by itself, so it never stands inside one.
    assert words.tokens[5:10] == ("!", "a", "b", "##a", "##b")
    assert set(words.tokens[10:]) == {"ab", "aa"}


def test_the_same_counts_give_the_same_vocabulary_in_any_order(word_counts):
    items = list(word_counts.items())
    first = vocabulary_learning.learn_vocabulary(word_counts, 1500)
    for seed in range(3):
        random.Random(seed).shuffle(items)
        assert vocabulary_learning.learn_vocabulary(collections.Counter(dict(items)), 1500) == first


def test_the_rarest_characters_go_where_there_are_too_many():
    rng = random.Random(0)
    counts = collections.Counter()
    for i in range(1500):  # characters of words of two, ever rarer
        counts[chr(0xAC00 + i) + rng.choice("abc")] = 1600 - i
    words = vocabulary_learning.learn_vocabulary(counts, 4000)
    kept = {t.removeprefix("##") for t in words.tokens if ord(t[-1]) >= 0xAC00 and len(t) in (1, 3)}
    assert kept == {chr(0xAC00 + i) for i in range(997)}  # and a, b, c
    words = vocabulary_learning.learn_vocabulary(counts, 405)
    kept = {t.removeprefix("##") for t in words.tokens if ord(t[-1]) >= 0xAC00 and len(t) in (1, 3)}
    assert kept == {chr(0xAC00 + i) for i in range(147)} and len(words) == 405


def test_words_that_the_tokenizer_takes_for_unknown_are_not_learnt(sentences):
    counts = vocabulary_learning.count_words(sentences)
    expected = vocabulary_learning.learn_vocabulary(counts, 1000)
    counts["zq" * 60] = 10**6
    assert vocabulary_learning.learn_vocabulary(counts, 1000) == expected


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_ids_are_those_of_tensorflow_texts_tokenizer(sentences, word_counts, do_lower_case):
    words = vocabulary_learning.learn_vocabulary(word_counts, 500)
    lines = ["", *sentences[:50], "Zürich", ""]
    theirs = tensorflow_text.BertTokenizer(
        tf.lookup.StaticVocabularyTable(
            tf.lookup.KeyValueTensorInitializer(
                words.tokens, tf.range(len(words), dtype=tf.int64), tf.string, tf.int64
            ),
            1,
        ),
        lower_case=do_lower_case,
        token_out_type=tf.int64,
    )
    expected = [
        [min(i, len(words)) for i in row]
        for row in theirs.tokenize(lines).merge_dims(1, 2).to_list()
    ]
    expected = [[1 if i == len(words) else i for i in row] for row in expected]
    for tokenizer in (words, pickle.loads(pickle.dumps(words))):
        assert tokenizer.tokenize(lines, do_lower_case) == expected
        ids, lengths = tokenizer.tokenize_flat(lines, do_lower_case)
        assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
        assert lengths.tolist() == [len(row) for row in expected]
        assert ids.tolist() == [i for row in expected for i in row]
    assert [len(part) for part in words.tokenize_flat([], do_lower_case)] == [0, 0]


def test_lines_beyond_the_first_batch_are_tokenized_alike(monkeypatch):
    words = vocabulary.Vocabulary((*SPECIAL, "a", "b"))
    monkeypatch.setattr(vocabulary, "LINES_AT_ONCE", 2)
    assert words.tokenize(["a", "b a", "", "b", "a b"]) == [[5], [6, 5], [], [6], [5, 6]]


def test_a_vocabulary_survives_its_file(tmp_path):
    words = vocabulary.Vocabulary((*SPECIAL, "cafe", "##s", "é"))
    path = tmp_path / "vocab.txt"
    vocabulary.write_vocabulary(words, str(path))
    assert list(tmp_path.iterdir()) == [path]
    assert vocabulary.read_vocabulary(str(path)) == words
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert vocabulary.read_vocabulary(str(path)).sha256 == words.sha256
    assert words.tokenize(["Cafés"]) == [[5, 6]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n", ["expected the tokens", "[MASK]"]),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx\nx\n", ["every token once", "'x'"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (None, ["cannot be read"]),
    ],
)
def test_a_bad_vocabulary_is_named(tmp_path, content, words):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        vocabulary.read_vocabulary(str(path))
    text = str(raised.value)
    assert text.startswith(f"--vocab_file={path}: ") and "\n" not in text
    for word in words:
        assert word in text


def run(*flags):
    return make_vocab.main(["make_vocab", *flags])


def test_the_program_writes_the_same_bytes_from_the_same_text(tmp_path, sentences, capsys):
    halves = ["\n\n".join(sentences[:200]), "\n\n".join(sentences[200:])]
    (tmp_path / "text").mkdir()
    for name, data in (("a.txt", halves[0].encode()), ("b.gz", gzip.compress(halves[1].encode()))):
        (tmp_path / "text" / name).write_bytes(data)
    (tmp_path / "swapped").mkdir()
    (tmp_path / "swapped" / "a.txt").write_text("\r\n\r\n".join(reversed(sentences)))
    output, again = tmp_path / "new" / "vocab.txt", tmp_path / "again.txt"
    assert run(f"--input={tmp_path}/text", f"--output={output}", "--vocab_size=900") == 0
    report = capsys.readouterr().out.splitlines()[-1]
    assert run(f"--input={tmp_path}/swapped", f"--output={again}", "--vocab_size=900") == 0
    assert output.read_bytes() == again.read_bytes()
    words = vocabulary.read_vocabulary(str(output))
    assert len(words) == 900 and list(output.parent.iterdir()) == [output]
    length, unknown = quality(words, vocabulary_learning.count_words(sentences))
    assert f"{length:.3f} tokens" in report and f"{100 * unknown:.3f}%" in report


def test_the_program_keeps_case_where_asked(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Zürich und Bern liegen in der Schweiz.\n" * 20)
    flags = [f"--input={tmp_path}/a.txt", f"--output={tmp_path}/vocab.txt", "--vocab_size=100"]
    assert run(*flags, "--do_lower_case=false") == 0
    cased = vocabulary.read_vocabulary(str(tmp_path / "vocab.txt"))
    assert "Zürich" in cased.tokens and "zurich" not in cased.tokens
    assert "Fewer tokens than --vocab_size=100" in capsys.readouterr().out
    assert run(*flags, "--overwrite") == 0
    uncased = vocabulary.read_vocabulary(str(tmp_path / "vocab.txt"))
    assert "Zürich" not in uncased.tokens and "zurich" in uncased.tokens


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--input: expected files"]),
        (["--input=a.txt"], ["--output: expected"]),
        (["--input=a.txt", "--output=x/"], ["--output: expected"]),
        (["--input=a.txt", "--output=o", "--vocab_size=9"], ["--vocab_size=9", "at least 100"]),
        (["--input=a.txt", "--output=o", "--vocab_size=many"], ["vocab_size", "many"]),
        (["--input=a.txt", "--output=o", "--input_format=xml"], ["--input_format=xml", "jsonl"]),
        (["--inputs=a.txt"], ["inputs"]),
        (["--input=none.txt", "--output=o"], ["--input=none.txt", "no file matches"]),
        (["--input=a.txt", "--output=a.txt"], ["--output=a.txt: expected a new file"]),
        (["--input=a.txt", "--output=folder"], ["--output=folder", "a folder"]),
        (["--input=a.txt", "--output=a.txt/o"], ["--output=a.txt/o", "cannot be written"]),
        (["--input=blank.txt", "--output=o"], ["blank.txt: expected text"]),
        (["--input=binary", "--output=o"], ["binary: expected UTF-8 text"]),
        (["--input=a.txt", "--output=o", "--input_format=jsonl"], ["a.txt:1: expected a JSON"]),
    ],
)
def test_what_cannot_work_is_named(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "binary").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    assert run(*flags) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "Counting" not in line and line
    ]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert (tmp_path / "a.txt").read_text() == "some text\n" and not (tmp_path / "o").exists()
