"""Text to records: against the original program, by what the manifest says, and when it is killed.

Most tests do the work of the worker processes in this one, which is a pool like any other.
"""

import collections
import errno
import importlib.util
import itertools
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import tensorflow as tf

from pretraining import (
    array_files,
    data_plan,
    data_tasks,
    examples,
    make_data,
    manifest,
    record_sets,
    scratch_folder,
    vocabulary,
    worker_pool,
)

ROOT = pathlib.Path(__file__).parents[1]
STATIC = {
    "input_ids",
    "input_mask",
    "segment_ids",
    "masked_lm_positions",
    "masked_lm_ids",
    "masked_lm_weights",
    "next_sentence_labels",
}
WORDS_EACH = 10  # words that occur in one document alone
DOCUMENTS = 60
FIRST_WORD = 9
VOCABULARY = vocabulary.Vocabulary(
    (
        *vocabulary.SPECIAL_TOKENS,
        ".",
        "##able",
        "##ing",
        "Upper",
        *(f"d{d}w{w}" for d in range(DOCUMENTS) for w in range(WORDS_EACH)),
    )
)


def write_text(path, sizes, seed=0):
    """Writes documents of so many sentences; a word tells from which document it is."""
    rng = random.Random(seed)
    documents = []
    for number, size in enumerate(sizes):
        sentences = []
        for _ in range(size):
            words = [f"d{number}w{rng.randrange(WORDS_EACH)}" for _ in range(rng.randint(3, 14))]
            words = [w + rng.choice(["", "", "", "able", "ing", "ableing"]) for w in words]
            sentences.append(" ".join(words))
        documents.append(sentences)
    path.write_text("\n\n".join("\n".join(sentences) for sentences in documents) + "\n")
    return documents


def owner(token):
    return (token - FIRST_WORD) // WORDS_EACH if token >= FIRST_WORD else None


class Pool:
    """Does the work in this process, in an order of its own."""

    seed = None

    def __init__(self, count, work, keep_open=()):
        self.pids = [os.getpid()] * count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, job, tasks):
        if self.seed is not None:
            tasks = list(tasks)
            random.Random(self.seed).shuffle(tasks)
        for name, task in tasks:
            yield name, data_tasks.work(job, task)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, request):
    if "real_workers" in request.fixturenames:
        return
    monkeypatch.setattr(worker_pool, "WorkerPool", Pool)
    monkeypatch.setattr(data_tasks, "_one_thread", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


@pytest.fixture
def real_workers():
    """Asks for worker processes."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    vocabulary.write_vocabulary(VOCABULARY, str(folder / "vocab.txt"))
    rng = random.Random(5)
    write_text(folder / "text.txt", [rng.randint(5, 40) for _ in range(DOCUMENTS)])
    return folder


def arguments(corpus, output, **flags):
    flags = {
        "input": corpus / "text.txt",
        "vocab_file": corpus / "vocab.txt",
        "output_dir": output,
        "max_seq_length": 40,
        "max_predictions_per_seq": 6,
        "dupe_factor": 2,
        "block_bytes": 12000,
        **flags,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def make(corpus, output, **flags):
    return make_data.main(["make_data", *arguments(corpus, output, **flags)])


def payloads(path):
    """The records of a file and where each begins, taken apart by hand."""
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        found.append((place, data[place + 12 : place + 12 + length]))
        place += length + 16
    assert place == len(data)
    return found


def features(record):
    parsed = tf.train.Example.FromString(record).features.feature
    return {name: list(f.int64_list.value or f.float_list.value) for name, f in parsed.items()}


def records_in(folder):
    """The features of all records, file by file."""
    return [
        [features(record) for _, record in payloads(path)]
        for path in sorted(pathlib.Path(folder).glob("*.tfrecord"))
    ]


def segments(record):
    """The tokens of A and B before masking."""
    tokens = np.array(record["input_ids"])
    for place, token, weight in zip(
        record.get("masked_lm_positions", []),
        record.get("masked_lm_ids", []),
        record.get("masked_lm_weights", []),
        strict=True,
    ):
        if weight:
            tokens[place] = token
    used = sum(record["input_mask"])
    b = sum(record["segment_ids"])
    assert tokens[0] == 2 and tokens[used - b - 1] == tokens[used - 1] == 3
    assert not tokens[used:].any()
    return tokens[1 : used - b - 1], tokens[used - b : used - 1]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """Records made without an interruption."""
    output = tmp_path_factory.mktemp("made") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool, "WorkerPool", Pool)
        patch.setattr(data_tasks, "_one_thread", lambda: None)
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        assert make(corpus, output, num_shards=5) == 0
    return output


def test_the_manifest_tells_the_truth(made):
    values = json.loads((made / "manifest.json").read_text())
    assert sorted(contents(made)) == sorted(
        ["manifest.json", *(shard["name"] for shard in values["shards"])]
    ), "nothing else is left"
    labels, lengths, labels_next = collections.Counter(), collections.Counter(), []
    for shard in values["shards"]:
        found = payloads(made / shard["name"])
        assert len(found) == shard["records"]
        assert (made / shard["name"]).stat().st_size == shard["bytes"]
        assert [place for place, _ in found[:: values["window"]]] == shard["offsets"]
        assert zlib.crc32(b"".join(record for _, record in found)) == shard["crc32"]
        for _, record in found:
            example = features(record)
            assert set(example) == STATIC == set(values["keys"].values())
            lengths[sum(example["input_mask"])] += 1
            labels_next += example["next_sentence_labels"]
            for token, weight in zip(
                example["masked_lm_ids"], example["masked_lm_weights"], strict=True
            ):
                labels[token] += weight == 1
    counts = values["counts"]
    sizes = [shard["records"] for shard in values["shards"]]
    assert len(sizes) == 5 and max(sizes) - min(sizes) <= 1
    assert counts["examples"] == sum(sizes) > 1000
    assert values["lengths"] == [lengths[n] for n in range(41)]
    assert counts["example_tokens"] == sum(n * count for n, count in lengths.items())
    assert counts["random_next"] == sum(labels_next)
    assert counts["actual_next"] == len(labels_next) - sum(labels_next)
    assert {int(k): v for k, v in values["label_counts"].items()} == {
        token: count for token, count in labels.items() if count
    }
    text = values["input"][0]
    document_lines = pathlib.Path(text["path"]).read_text().split("\n\n")
    assert counts["documents"] == len(document_lines) == DOCUMENTS
    lines = [line for d in document_lines for line in d.strip().split("\n")]
    assert counts["sentences"] == len(lines)
    assert counts["tokens"] == sum(map(len, VOCABULARY.tokenize(lines)))
    assert counts["unknown_tokens"] == counts["bad_bytes"] == 0
    assert values["vocab"] == {"sha256": VOCABULARY.sha256, "size": len(VOCABULARY)}
    assert (values["max_seq_length"], values["max_predictions_per_seq"]) == (40, 6)
    assert manifest.read(str(made), "--x").shards()[f"{made}/{shard['name']}"].records == sizes[-1]


def test_pairs_are_from_the_documents_that_the_label_says(made):
    for record in (record for shard in records_in(made) for record in shard):
        a, b = ({owner(t) for t in segment} - {None} for segment in segments(record))
        assert len(a) == len(b) == 1
        assert (a != b) == bool(record["next_sentence_labels"][0])


def test_shards_are_shuffled_over_the_whole_corpus(made):
    shards = records_in(made)
    for shard in shards:
        owners = [max(owner(t) or 0 for t in segments(record)[0]) for record in shard]
        assert len(set(owners)) > DOCUMENTS / 2
        # Neighbours are strangers: the mean distance of two of 60 numbers drawn at random is 20.
        assert abs(np.abs(np.diff(owners)).mean() - 20) < 4
    seen = collections.Counter(tuple(r["input_ids"]) for shard in shards for r in shard)
    assert max(seen.values()) <= 3, "duplicates are cut and masked anew"


def test_bytes_depend_on_nothing_but_what_is_asked_for(made, corpus, tmp_path, monkeypatch):
    for seed in (1, 2):
        monkeypatch.setattr(Pool, "seed", seed)
        assert make(corpus, tmp_path / str(seed), num_shards=5, workers=seed) == 0
        assert contents(tmp_path / str(seed)) == contents(made)
    assert make(corpus, tmp_path / "other", num_shards=5, random_seed=1) == 0
    assert contents(tmp_path / "other") != contents(made)


class Killed(BaseException):
    """Stands for a kill -9."""


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_and_repeated_it_ends_with_the_same_bytes(
    made, corpus, tmp_path, monkeypatch, seed
):
    """Every file gets its name by a rename, so before and between those are all the moments."""
    rng, allowed = random.Random(seed), [0]
    rename, remove, remote = os.rename, os.remove, tf.io.gfile.rename

    def counted(function):
        def call(*values, **options):
            if not allowed[0]:
                raise Killed
            allowed[0] -= 1
            return function(*values, **options)

        return call

    monkeypatch.setattr(os, "rename", counted(rename))
    monkeypatch.setattr(os, "remove", counted(remove))
    monkeypatch.setattr(tf.io.gfile, "rename", counted(remote))
    output, kills, finished = tmp_path / "data", 0, {}
    while True:
        allowed[0] = rng.randint(2, 9)
        try:
            assert make(corpus, output, num_shards=5) == 0
            break
        except Killed:
            kills += 1
        for path in output.glob("*.tfrecord"):
            assert path.read_bytes() == (made / path.name).read_bytes(), (
                "what has its name is whole"
            )
            found = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert finished.setdefault(path.name, found) == found, "it is not made again"
        manifest_there = (output / "manifest.json").exists()
        assert not manifest_there or len(finished) == 5
    assert kills > 3
    assert contents(output) == contents(made)
    for name, found in finished.items():
        assert found == ((output / name).stat().st_ino, (output / name).stat().st_mtime_ns)


def start(corpus, output, **flags):
    return subprocess.Popen(
        [sys.executable, "-m", "pretraining.make_data", *arguments(corpus, output, **flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid):
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(process, condition):
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.003)


def test_real_processes_killed_and_repeated(corpus, tmp_path, real_workers):
    """A worker is killed, then the parent of others, each in the middle of writing shards."""
    flags = {"num_shards": 24, "dupe_factor": 30, "max_seq_length": 24, "workers": 2}
    output = tmp_path / "data"
    process = start(corpus, output, **flags)
    wait_for(process, lambda: list(output.glob("*.tfrecord")))
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"worker 2 of 2, process {workers[1]}, was killed by SIGKILL" in line
    assert "records-000" in line or "waited for work" in line
    assert "Traceback" not in errors

    before = contents_of_records(output)
    assert 0 < len(before) < 24
    process = start(corpus, output, **flags)
    wait_for(process, lambda: len(list(output.glob("*.tfrecord"))) > len(before) + 2)
    process.kill()
    process.communicate(timeout=300)
    assert not (output / "manifest.json").exists()
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        # What is left is done in this process: it is the same to the files.
        patch.setattr(worker_pool, "WorkerPool", Pool)
        patch.setattr(data_tasks, "_one_thread", lambda: None)
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        assert make(corpus, output, **flags) == 0
        assert make(corpus, whole, **flags) == 0
    after = contents_of_records(output)
    assert len(after) == 24 and before.items() <= after.items(), "finished ones are kept"
    assert contents(whole) == contents(output)


def contents_of_records(folder):
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.glob("*.tfrecord")
    }


@pytest.fixture(scope="module")
def original_records(corpus, tmp_path_factory):
    """The records of tf-models' program, which is a process of its own because of its flags."""
    output = tmp_path_factory.mktemp("original") / "data.tfrecord"
    package = importlib.util.find_spec("official").submodule_search_locations[0]
    flags = {
        "input_file": corpus / "text.txt",
        "output_file": output,
        "vocab_file": corpus / "vocab.txt",
        "max_seq_length": 40,
        "max_predictions_per_seq": 6,
        "dupe_factor": 8,
        "short_seq_prob": 0.2,
    }
    subprocess.run(
        [
            sys.executable,
            f"{package}/nlp/data/create_pretraining_data.py",
            *(f"--{name}={value}" for name, value in flags.items()),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    return [features(record) for _, record in payloads(output)]


def largest_gap(first, second):
    """The Kolmogorov-Smirnov statistic, in units of its standard deviation."""
    values = np.union1d(first, second)
    a, b = (np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (first, second))
    return np.abs(a - b).max() * np.sqrt(len(first) * len(second) / (len(first) + len(second)))


def test_the_records_are_those_of_the_original_program(corpus, tmp_path, original_records):
    assert make(corpus, tmp_path / "ours", dupe_factor=8, short_seq_prob=0.2, block_bytes=0) == 0
    ours = [record for shard in records_in(tmp_path / "ours") for record in shard]
    theirs = original_records
    assert min(len(ours), len(theirs)) > 4000
    assert {n: len(v) for n, v in ours[0].items()} == {n: len(v) for n, v in theirs[0].items()}
    assert abs(len(ours) / len(theirs) - 1) < 0.04
    measures = {
        "tokens": lambda r: sum(r["input_mask"]),
        "tokens in A": lambda r: len(segments(r)[0]),
        "tokens in B": lambda r: len(segments(r)[1]),
        "predictions": lambda r: sum(r["masked_lm_weights"]),
        "document of A": lambda r: max(owner(t) or 0 for t in segments(r)[0]),
        "document of a random B": lambda r: (
            max(owner(t) or 0 for t in segments(r)[1]) * r["next_sentence_labels"][0]
        ),
        "place of a prediction": lambda r: r["masked_lm_positions"][0] / sum(r["input_mask"]),
    }
    for name, measure in measures.items():
        # Pairs of one document are alike, so fluctuations are somewhat larger than independent ones.
        assert largest_gap(list(map(measure, ours)), list(map(measure, theirs))) < 2.2, name
    shares = [np.mean([r["next_sentence_labels"][0] for r in found]) for found in (ours, theirs)]
    assert abs(shares[0] - shares[1]) < 5 * np.sqrt(0.5 / min(len(ours), len(theirs)))
    kinds = [masking_kinds(found) for found in (ours, theirs)]
    for kind in ("mask", "kept", "replaced"):
        share = [counts[kind] / counts.total() for counts in kinds]
        assert abs(share[0] - share[1]) < 5 * np.sqrt(2 * share[0] / kinds[0].total()), kind


def masking_kinds(records):
    kinds = collections.Counter()
    for record in records:
        for place, token, weight in zip(
            record["masked_lm_positions"],
            record["masked_lm_ids"],
            record["masked_lm_weights"],
            strict=True,
        ):
            seen = record["input_ids"][place]
            if weight:
                kinds["mask" if seen == 4 else "kept" if seen == token else "replaced"] += 1
    return kinds


def test_dynamic_records_hold_the_text_alone(corpus, tmp_path):
    assert make(corpus, tmp_path / "data", masking="dynamic", num_shards=2) == 0
    values = json.loads((tmp_path / "data/manifest.json").read_text())
    keys = {"input_ids", "input_mask", "segment_ids", "next_sentence_labels"}
    assert values["masking"] == "dynamic" and set(values["keys"].values()) == keys
    lines = [line for line in (corpus / "text.txt").read_text().split("\n") if line]
    neighbours = set(itertools.pairwise(t for ids in VOCABULARY.tokenize(lines) for t in ids))
    counts = collections.Counter()
    for record in (record for shard in records_in(tmp_path / "data") for record in shard):
        assert set(record) == keys
        assert 4 not in record["input_ids"], "[MASK]"
        for segment in segments(record):
            counts.update(segment.tolist())
            assert set(itertools.pairwise(segment.tolist())) <= neighbours
    assert {int(token): n for token, n in values["label_counts"].items()} == dict(counts)


def test_words_are_masked_as_wholes(corpus, tmp_path):
    assert make(corpus, tmp_path / "data", do_whole_word_mask=True, masked_lm_prob=0.1) == 0
    longer = 0
    for record in (record for shard in records_in(tmp_path / "data") for record in shard):
        tokens = np.concatenate([[2], *(np.append(s, 3) for s in segments(record))])
        count = int(sum(record["masked_lm_weights"]))
        predicted = set(record["masked_lm_positions"][:count])
        for place, token in enumerate(tokens):
            if token in (6, 7) and tokens[place - 1] not in (2, 3):  # ##able and ##ing
                assert (place in predicted) == (place - 1 in predicted)
                longer += place in predicted
    assert longer > 100


def test_case_is_kept_or_not(corpus, tmp_path):
    (tmp_path / "text.txt").write_text("Upper upper d1w1\nD1W1\n\nd2w2 Upper\nd2w2 d2w2\n")
    for lower, upper in ((True, False), (False, True)):
        output = tmp_path / str(lower)
        assert make(tmp_path, output, vocab_file=corpus / "vocab.txt", do_lower_case=lower) == 0
        tokens = {
            int(t) for s in records_in(output) for r in s for part in segments(r) for t in part
        }
        assert (8 in tokens) == upper  # "Upper", which lower-cased text cannot hold
        # "upper" is unknown in any case, D1W1 only where it is not lower-cased.
        counts = json.loads((output / "manifest.json").read_text())["counts"]
        assert counts["unknown_tokens"] == (3 if lower else 2)


def test_paragraphs_are_split_into_sentences(corpus, tmp_path):
    (tmp_path / "text.txt").write_text(
        "d1w1 D1w2 d1w3. D1w4 d1w5 d1w6. D1w7 d1w8.\nD1w1 d1w1.\n\nD2w1 d2w2. D2w3.\n"
    )
    flags = {"vocab_file": corpus / "vocab.txt", "input_format": "paragraphs"}
    assert make(tmp_path, tmp_path / "data", **flags) == 0
    counts = json.loads((tmp_path / "data/manifest.json").read_text())["counts"]
    assert (counts["documents"], counts["sentences"]) == (2, 6)


@pytest.mark.parametrize(
    "sizes", [[900, 3], [3, 900], [700, 700], [300, 2, 2, 300, 2, 300], [2000, 1, 1, 1]]
)
def test_documents_longer_than_a_block_borrow_others(corpus, tmp_path, sizes):
    write_text(tmp_path / "text.txt", sizes)
    flags = {"vocab_file": corpus / "vocab.txt", "dupe_factor": 1, "masking": "dynamic"}
    assert make(tmp_path, tmp_path / "data", num_shards=3, block_bytes=6000, **flags) == 0
    values = json.loads((tmp_path / "data/manifest.json").read_text())
    assert values["counts"]["documents"] == len(sizes)
    assert abs(values["counts"]["sentences"] - sum(sizes)) <= sum(sizes) / 50
    found = collections.Counter()
    for record in (record for shard in records_in(tmp_path / "data") for record in shard):
        a, b = ({owner(t) for t in segment} - {None} for segment in segments(record))
        assert len(a) == len(b) == 1
        assert (a != b) == bool(record["next_sentence_labels"][0])
        found[record["next_sentence_labels"][0]] += 1
    assert 0.4 < found[1] / found.total() < 0.7


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("d1w1 d1w2\nd1w3\n", {}, "expected at least two documents"),
        ("d1w1\n\n\u200b\n\n\u200b\n", {}, "expected at least two documents"),
        ("d1w1\n\nd2w1\n", {"num_shards": 9}, "--num_shards=9: expected at most"),
        ("d1w1\n\nd2w1\n", {"vocab_file": "/nowhere"}, "--vocab_file=/nowhere"),
        ("d1w1\n\nd2w1\n", {"input": "/nowhere"}, "--input=/nowhere"),
        ("d1w1\n\nd2w1\n", {"input_format": "jsonl"}, "text.txt:1: expected a JSON object"),
        ("d1w1\n\nd2w1\n", {"output_dir": ""}, "--output_dir: expected a folder"),
        ("d1w1\n\nd2w1\n", {"output_dir": "/proc/x"}, "--output_dir=/proc/x: expected a folder"),
        ("d1w1\n\nd2w1\n", {"max_predictions_per_seq": 41}, "--max_predictions_per_seq=41"),
        ("d1w1\n\nd2w1\n", {"masked_lm_prob": 0}, "--masked_lm_prob=0.0: expected more than 0"),
        ("d1w1\n\nd2w1\n", {"masking": "both"}, "--masking=both: expected one of static, dynamic"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(corpus, tmp_path, capsys, text, flags, said):
    (tmp_path / "text.txt").write_text(text)
    flags = {"vocab_file": corpus / "vocab.txt", **flags}
    assert make(tmp_path, flags.pop("output_dir", tmp_path / "data"), **flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ") and said in line
    left = [path.name for path in tmp_path.rglob("*") if "tfrecord" in path.name]
    assert not left
    # Other text may be given at once.
    if flags.get("input_format") != "jsonl":
        assert not (tmp_path / "data" / scratch_folder.NAME).exists()


def test_a_folder_that_is_complete_is_left_alone(made, corpus, capsys, tmp_path):
    before = {path: path.stat() for path in made.iterdir()}
    assert make(corpus, made, num_shards=5) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert make(corpus, made, num_shards=5, random_seed=6, max_seq_length=41) == 2
    error = capsys.readouterr().err
    assert "--max_seq_length was 40, is 41; --random_seed was 12345, is 6" in error
    text = tmp_path / "text.txt"
    text.write_text((corpus / "text.txt").read_text())
    assert make(corpus, made, num_shards=5, input=text) == 2
    error = capsys.readouterr().err
    assert f"--input: {corpus}/text.txt is gone and 1 files more" in error
    assert {path: path.stat() for path in made.iterdir()} == before


def test_a_complete_folder_that_lacks_a_shard_is_refused(made, corpus, capsys, tmp_path):
    output = tmp_path / "data"
    output.mkdir()
    for name, content in contents(made).items():
        (output / name).write_bytes(content)
    (output / "records-00003-of-00005.tfrecord").write_bytes(b"")
    assert make(corpus, output, num_shards=5) == 2
    assert "records-00003-of-00005.tfrecord with" in capsys.readouterr().err


def test_records_of_others_are_not_mixed_with(corpus, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.tfrecord").write_bytes(b"")
    assert make(corpus, tmp_path / "data") == 2
    assert "records of other programs. Received: one with train.tfrecord" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train.tfrecord"]


def test_a_full_disk_is_a_line_and_the_work_goes_on_later(
    made, corpus, tmp_path, capsys, monkeypatch
):
    written, calls = array_files.write_arrays, []

    def full(path, *values):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        written(path, *values)

    monkeypatch.setattr(array_files, "write_arrays", full)
    assert make(corpus, tmp_path / "data", num_shards=5) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"--output_dir={tmp_path}/data" in line and "No space left on device" in line
    assert "repeat the command" in line
    done = len(calls) - 1
    assert make(corpus, tmp_path / "data", num_shards=5) == 0
    assert not set(calls[:done]) & set(calls[done + 1 :]), "finished blocks are kept"
    assert contents(tmp_path / "data") == contents(made)


def test_unfinished_work_of_other_settings_or_input_is_refused(
    corpus, tmp_path, capsys, monkeypatch
):
    text, output = tmp_path / "text.txt", tmp_path / "data"
    text.write_text((corpus / "text.txt").read_text())
    flags = {"input": text, "num_shards": 5}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(array_files, "write_arrays", stop)
        assert make(corpus, output, **flags) == 130
    capsys.readouterr()
    assert make(corpus, output, **flags, dupe_factor=3) == 2
    assert "unfinished work of other settings: --dupe_factor was 2, is 3" in capsys.readouterr().err
    os.utime(text, ns=(1, 1))
    assert make(corpus, output, **flags) == 2
    assert f"--input: {text} has changed" in capsys.readouterr().err
    (tmp_path / "vocab.txt").write_text((corpus / "vocab.txt").read_text() + "more\n")
    assert make(corpus, output, **flags, vocab_file=tmp_path / "vocab.txt") == 2
    assert "--vocab_file held other tokens" in capsys.readouterr().err


def test_two_runs_at_once_are_refused(corpus, tmp_path, capsys):
    output = tmp_path / "data"
    with scratch_folder.ScratchFolder(scratch_folder.place(str(output), "")).locked(str(output)):
        assert make(corpus, output) == 2
    assert f"process {os.getpid()} is at work" in capsys.readouterr().err
    assert not output.exists(), "no trace of a run that planned nothing"
    assert make(corpus, output) == 0


def test_unfinished_work_may_be_kept_elsewhere(made, corpus, tmp_path, monkeypatch):
    seen = []
    written = array_files.write_arrays
    monkeypatch.setattr(
        array_files, "write_arrays", lambda path, *rest: (seen.append(path), written(path, *rest))
    )
    work = tmp_path / "work"
    assert make(corpus, tmp_path / "data", num_shards=5, work_dir=work) == 0
    assert seen and all(path.startswith(f"{work}/") for path in seen)
    assert not list(work.iterdir())
    assert contents(tmp_path / "data") == contents(made)


def test_shards_are_not_limited_by_memory(made, corpus, tmp_path, monkeypatch):
    """Several intervals of keys, one after the other, are the same file."""
    monkeypatch.setattr("pretraining.shards.TOKENS_AT_ONCE", 3000)
    assert make(corpus, tmp_path / "data", num_shards=5) == 0
    assert contents(tmp_path / "data") == contents(made)


@pytest.mark.parametrize("documents", [3, 40])
def test_records_of_a_few_documents_without_any_process(tmp_path, documents):
    texts = write_text(tmp_path / "text.txt", [9] * documents)
    settings = examples.ExampleSettings(
        max_seq_length=40, max_predictions_per_seq=6, dupe_factor=4, random_seed=1
    )
    folder = str(tmp_path / "data")
    values = record_sets.make_records(
        texts, VOCABULARY, settings, folder, num_shards=2, name="train"
    )
    assert json.loads((tmp_path / "data/manifest.json").read_text())["shards"] == values["shards"]
    found = records_in(folder)
    assert [len(shard) for shard in found] == [shard["records"] for shard in values["shards"]]
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "manifest.json",
        "train-00000-of-00002.tfrecord",
        "train-00001-of-00002.tfrecord",
    }
    assert {
        owner(segments(r)[0][0])
        for shard in found
        for r in shard
        if owner(segments(r)[0][0]) is not None
    } == set(range(documents))
    with pytest.raises(ValueError, match="this text: expected at least two documents"):
        record_sets.make_records(texts[:1], VOCABULARY, settings, folder, what="this text")


def test_the_number_of_shards_suits_the_input():
    config = make_data.DataConfig(input="x", vocab_file="x", output_dir="x")
    for size in (10**3, 10**6, 10**7, 10**8, 10**10, 10**11, 10**13):
        count = data_plan.num_shards(size, max(1, size // 60), config)
        assert count & (count - 1) == 0, "a power of two, so that readers share them evenly"
        assert count <= max(1, size // 60)
        if size <= 10**7:
            assert 1 <= count <= 8
        elif size >= 3 * 10**10:
            assert count >= 256
        else:
            assert count >= 16
        if 10**8 <= size <= 10**10:
            assert 25e6 < size // 60 * 930 / count < 80e6
    assert data_plan.num_shards(10**8, 3, config) == 2
