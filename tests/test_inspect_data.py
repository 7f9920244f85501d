"""What inspect_data shows, and that it finds every kind of damage."""

import json
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

from pretraining import inspect_data, inspection
from pretraining.record_checks import RecordCheck
from tests.test_manifest import damaged_at, write_manifest
from tests.test_records import FORMAT, rewritten, set_value

NAMES = [f"train-{i}.tfrecord" for i in range(3)]


@pytest.fixture
def folder(small_records, tmp_path):
    """Three files of records with a manifest."""
    made = tmp_path / "records"
    made.mkdir()
    for name in NAMES:
        shutil.copy(small_records.folder / name, made)
    write_manifest(made, small_records.words, NAMES)
    return made


def inspect(small_records, files, *flags):
    vocabulary = f"--vocab_file={small_records.folder}/vocab.txt"
    return inspect_data.main(["inspect_data", f"--input_files={files}", vocabulary, *flags])


def decoded(*paths):
    """The stored features, straight from the records."""
    records = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(list(paths))]
    return [
        {
            key: np.array(feature.int64_list.value or feature.float_list.value)
            for key, feature in record.features.feature.items()
        }
        for record in records
    ]


def test_sound_records_are_described_with_their_true_statistics(small_records, folder, capsys):
    assert inspect(small_records, folder, "--examples=2") == 0
    printed = capsys.readouterr().out
    examples = decoded(*(str(folder / name) for name in NAMES))
    assert f"3 files, {len(examples)} records" in printed
    lengths = [int(e["input_mask"].sum()) for e in examples]
    assert f"mean {np.mean(lengths):.1f}, least {min(lengths)}, most {max(lengths)}" in printed
    predicted = sum(int(e["masked_lm_weights"].sum()) for e in examples)
    assert f"Tokens to predict: {predicted / sum(lengths):.2%} of all" in printed
    shares = re.search(r"\[MASK\] ([\d.]+)%, unchanged ([\d.]+)%, replaced ([\d.]+)%", printed)
    assert sum(map(float, shares.groups())) == pytest.approx(100, abs=0.02)
    mask = small_records.words.ids["[MASK]"]
    hidden = sum(
        int(e["input_ids"][p] == mask)
        for e in examples
        for p, w in zip(e["masked_lm_positions"], e["masked_lm_weights"], strict=True)
        if w
    )
    assert float(shares[1]) == pytest.approx(100 * hidden / predicted, abs=0.01)
    random = np.mean([e["next_sentence_labels"][0] for e in examples])
    assert f"Second segments of another document: {random:.2%}" in printed
    assert f"Every one of the {len(examples)} records fits" in printed
    assert printed.count(": record ") == 2


def test_words_to_predict_are_marked(small_records):
    words = small_records.words
    mask = words.ids["[MASK]"]
    example = {
        "input_word_ids": np.array([2, 5, mask, 7, 3, 8, 9, 3, 0]),
        "input_mask": np.array([1] * 8 + [0]),
        "masked_lm_positions": np.array([2, 3, 5, 0]),
        "masked_lm_ids": np.array([6, 7, 10, 0]),
        "masked_lm_weights": np.array([1.0, 1.0, 1.0, 0.0]),
    }
    assert inspection.spell(example, words) == (
        "[CLS] word0 {word1} {word2=} [SEP] {word5>word3} word4 [SEP]"
    )


def test_records_without_a_manifest_are_described_too(small_records, capsys):
    assert inspect(small_records, small_records.folder / "train-0.tfrecord") == 0
    assert "without a manifest.json" in capsys.readouterr().out


def test_masks_drawn_while_training_are_shown_as_drawn(small_records, tmp_path, capsys):
    folder = tmp_path / "dynamic"
    folder.mkdir()
    source = small_records.folder / NAMES[0]
    found = RecordCheck(record_format=FORMAT, flag="--input_files").run([str(source)])
    keys = {k: v for k, v in found.keys.items() if "masked" not in k}
    shutil.copy(source, folder)
    changes = {"masking": "dynamic", "masked_lm_prob": 0.25, "keys": keys}
    write_manifest(folder, small_records.words, [NAMES[0]], **changes)
    assert inspect(small_records, folder, "--examples=1") == 0
    printed = capsys.readouterr().out
    assert "Masks are drawn while training: 25% of the tokens" in printed
    line = next(x for x in printed.splitlines() if x.startswith("[CLS]"))
    assert line.count("{") == max(1, round(0.25 * len(line.split())))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: damaged_at(f / NAMES[1], 7), [NAMES[1], "record 7 is damaged"]),
        (lambda f: (f / NAMES[2]).unlink(), [NAMES[2], "Received: no such file"]),
        (lambda f: change(f, NAMES[0], 4, set_value("input_ids", 3, 65)), [NAMES[0], "record 4"]),
        (lambda f: change(f, NAMES[0], 4, set_value("input_ids", 3, 9)), [NAMES[0], "checksum"]),
        (lambda f: cut(f / NAMES[1], 11), [NAMES[1], "record 11 is damaged"]),
        (lambda f: other_vocabulary(f), ["--vocab_file: expected the vocabulary"]),
        (lambda f: other_offset(f), [NAMES[1], "record 16: expected at byte"]),
        (lambda f: shutil.copy(f / NAMES[0], f / "z.tfrecord"), ["z.tfrecord", "3 files that"]),
    ],
)
def test_damage_is_named_by_file_and_record(small_records, folder, capsys, damage, words):
    damage(folder)
    assert inspect(small_records, folder) == 1
    printed = capsys.readouterr().out
    fault = next(line for line in printed.splitlines() if line.startswith("FAULT"))
    for word in words:
        assert word in fault, printed


def test_several_faults_are_all_found(small_records, folder, capsys):
    damaged_at(folder / NAMES[1], 7)
    change(folder, NAMES[0], 4, set_value("masked_lm_ids", 0, 99))
    lengths = [e["input_mask"].sum() for e in decoded(str(folder / NAMES[2]))]
    short = next(i for i, length in enumerate(lengths) if length < 32)
    change(folder, NAMES[2], short, set_value("masked_lm_positions", 0, 31))
    assert inspect(small_records, folder, "--max_faults=2") == 1
    printed = capsys.readouterr().out
    assert printed.count("FAULT") == 2 and "... and 2 more" in printed
    assert "Faults: 4, in" in printed  # the last one by the checksum of its file as well


def change(folder, name, at, how):
    """Rewrites one record of a file."""
    path = folder / name
    rewritten(path, folder / "changed", how, at)
    shutil.move(folder / "changed", path)


def cut(path, record):
    """Cuts a file in the middle of a record."""
    sizes = [len(r.numpy()) + 16 for r in tf.data.TFRecordDataset(str(path))]
    with open(path, "r+b") as file:
        file.truncate(sum(sizes[:record]) + 30)


def other_offset(folder):
    """Says in the manifest that a window begins elsewhere."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][1]["offsets"][1] += 5
    path.write_text(json.dumps(values))


def other_vocabulary(folder):
    """Says in the manifest that the records were made with another vocabulary."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "vocab": {"sha256": "1" * 64, "size": 65}}))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vocab_file=x"], ["--input_files: expected"]),
        (["--input_files=/nowhere/x", "--vocab_file={vocab}"], ["--input_files=/nowhere/x"]),
        (["--input_files={vocab}", "--vocab_file={vocab}"], ["expected a TFRecord file"]),
        (["--input_files=x", "--vocab_file=/nowhere/v"], ["--vocab_file=/nowhere/v"]),
        (["--examples=-1"], ["--examples=-1: expected at least 0"]),
    ],
)
def test_flags_that_cannot_work_give_one_line(small_records, capsys, flags, words):
    vocab = f"{small_records.folder}/vocab.txt"
    argv = ["inspect_data", *(flag.format(vocab=vocab) for flag in flags)]
    assert inspect_data.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    for word in words:
        assert word in error[-1]
