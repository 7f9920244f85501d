"""What a manifest promises of the records beside it, and what happens where it is not so."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from pretraining import files, manifest
from pretraining.config import Config
from pretraining.data import Data, DataFiles, given_files, read_data
from pretraining.errors import InputError
from pretraining.model import MODELS
from pretraining.record_checks import RecordCheck
from pretraining.run_directory import RunDirectory
from tests.conftest import LENGTH, PREDICTIONS
from tests.test_records import FORMAT

WINDOW = 16


def write_manifest(folder, words, names, **changes):
    """Writes the manifest of records that stand in a folder already."""
    paths = [f"{folder}/{name}" for name in names]
    found = RecordCheck(record_format=FORMAT, flag="--input_files").run(paths)
    shards = []
    for name, shard in zip(names, found.shards, strict=True):
        sizes = [len(r.numpy()) + 16 for r in tf.data.TFRecordDataset(shard.path)]
        offsets = np.cumsum([0, *sizes])[:-1:WINDOW].tolist()
        shards.append(
            {
                "name": name,
                "records": shard.records,
                "bytes": shard.size,
                "crc32": shard.crc32,
                "offsets": offsets,
            }
        )
    values = {
        "shards": shards,
        "window": WINDOW,
        "max_seq_length": LENGTH,
        "max_predictions_per_seq": PREDICTIONS,
        "masking": "static",
        "masked_lm_prob": 0.15,
        "do_whole_word_mask": False,
        "vocab": {"sha256": words.sha256, "size": len(words)},
        "keys": found.keys,
        "label_counts": found.to_json()["label_counts"],
        **changes,
    }
    manifest.write(str(folder), values)


@pytest.fixture
def known_records(small_records, tmp_path):
    """A folder with three files of records and their manifest."""
    folder = tmp_path / "records"
    folder.mkdir()
    names = [f"train-{i}.tfrecord" for i in range(3)]
    for name in names:
        shutil.copy(small_records.folder / name, folder)
    write_manifest(folder, small_records.words, names)
    return folder


def config(small_records, known_records, **flags):
    values = {
        "input_files": str(known_records),
        "eval_files": f"{small_records.folder}/eval.tfrecord",
        "vocab_file": f"{small_records.folder}/vocab.txt",
        "max_seq_length": LENGTH,
        "max_predictions_per_seq": PREDICTIONS,
        "train_batch_size": 8,
        **flags,
    }
    return Config(**values)


def read(small_records, known_records, tmp_path, **flags) -> Data:
    settings = config(small_records, known_records, **flags)
    bert = dataclasses.replace(MODELS["tiny"], vocab_size=65)
    phase, directory = settings.phases[0], RunDirectory(str(tmp_path / "run"))
    return read_data(given_files(settings, phase), settings, phase, bert, directory)


def test_records_with_a_manifest_are_not_read_before_the_start(
    small_records, known_records, tmp_path, monkeypatch
):
    scanned = read(small_records, small_records.folder / "train-*.tfrecord", tmp_path)
    monkeypatch.setattr(RecordCheck, "_runs", None)
    known = read(small_records, known_records, tmp_path, mode="train", eval_files="")
    assert known.fresh == ()
    assert known.train.fingerprint == scanned.train.fingerprint
    assert (known.train.label_counts == scanned.train.label_counts).all()
    assert [s.offsets[0] for s in known.train.shards] == [0, 0, 0]


def damaged_at(path, record, inside=40):
    """Flips a bit of one record of a file."""
    sizes = [len(r.numpy()) + 16 for r in tf.data.TFRecordDataset(str(path))]
    data = bytearray(path.read_bytes())
    data[sum(sizes[:record]) + inside] ^= 1
    path.write_bytes(data)


def refused(small_records, known_records, tmp_path, **flags):
    with pytest.raises(InputError) as raised:
        read(small_records, known_records, tmp_path, **flags)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_missing_file_is_named_whether_a_folder_or_a_glob_is_given(
    small_records, known_records, tmp_path
):
    (known_records / "train-1.tfrecord").unlink()
    for given in (known_records, f"{known_records}/", f"{known_records}/train-*.tfrecord"):
        text = refused(small_records, given, tmp_path)
        assert f"--input_files={known_records}/train-1.tfrecord: expected the file" in text
    # Some of the files by name are a choice.
    names = f"{known_records}/train-0.tfrecord,{known_records}/train-2.tfrecord"
    assert len(read(small_records, names, tmp_path).train.shards) == 2


def test_a_truncated_file_is_named_with_its_first_lost_record(
    small_records, known_records, tmp_path
):
    path = known_records / "train-2.tfrecord"
    sizes = [len(r.numpy()) + 16 for r in tf.data.TFRecordDataset(str(path))]
    for rest in (0, 3, 30):
        with open(path, "r+b") as file:
            file.truncate(sum(sizes[:9]) + rest)
        text = refused(small_records, known_records, tmp_path)
        assert f"--input_files={path}: record 9 is damaged" in text


def test_another_file_under_the_same_name_is_refused(small_records, known_records, tmp_path):
    with open(known_records / "train-1.tfrecord", "ab") as file:
        file.write((small_records.folder / "train-2.tfrecord").read_bytes())
    text = refused(small_records, known_records, tmp_path)
    assert f"{known_records}/train-1.tfrecord: expected the" in text and "checksum" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab": {"sha256": "0" * 64, "size": 9}}, ["--vocab_file: expected", "9 tokens"]),
        ({"max_seq_length": 512}, [f"--max_seq_length={LENGTH}: expected 512"]),
        ({"max_predictions_per_seq": 7}, [f"--max_predictions_per_seq={PREDICTIONS}: expected 7"]),
        ({"format": 2}, ["expected format 1. Received: 2"]),
        ({"keys": None, "shards": 3}, ["expected the manifest that make_data wrote"]),
        ({"window": 8}, ["expected the manifest that make_data wrote", "ascending offsets"]),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    small_records, known_records, tmp_path, changes, words
):
    path = known_records / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    text = refused(small_records, known_records, tmp_path)
    for word in words:
        assert word in text, text


def test_a_damaged_manifest_is_refused(small_records, known_records, tmp_path):
    (known_records / "manifest.json").write_text("{")
    text = refused(small_records, known_records, tmp_path)
    assert f"--input_files={known_records}/manifest.json: expected the manifest" in text


def test_a_file_beside_a_manifest_that_does_not_know_it_is_refused(
    small_records, known_records, tmp_path
):
    shutil.copy(small_records.folder / "eval.tfrecord", known_records)
    text = refused(small_records, known_records, tmp_path)
    assert f"--input_files={known_records}/eval.tfrecord: expected one of the 3 files" in text
    # By its own name it is a set of records without a manifest.
    data = read(small_records, known_records / "eval.tfrecord", tmp_path)
    assert "input_files" in data.fresh and len(data.train.shards) == 1


def test_files_are_named_as_the_flag_names_them(small_records, known_records, monkeypatch):
    monkeypatch.chdir(known_records)
    found = files.find_files("train-*", "--input_files")
    known = manifest.manifests_of(found, "--input_files")
    shards = manifest.record_set(found, known, 65, "--input_files").shards
    assert [shard.path for shard in shards] == [f"./train-{i}.tfrecord" for i in range(3)]


def test_skipping_leaves_the_identity_of_the_records_as_it_was(
    small_records, known_records, tmp_path
):
    before = read(small_records, known_records, tmp_path).train
    damaged_at(known_records / "train-1.tfrecord", 11)
    skipping = read(small_records, known_records, tmp_path, skip_corrupt_records=True)
    assert skipping.train.fingerprint == before.fingerprint
    assert skipping.train.corrupt_records == 1
    assert skipping.train.num_records == before.num_records
    # The next start finds what this one has found.
    directory = RunDirectory(str(tmp_path / "run"))
    directory.create()
    skipping.remember(directory)
    again = read(small_records, known_records, tmp_path, skip_corrupt_records=True)
    assert again.fresh == () or again.fresh == ("eval_files",)
    assert again.train.shards == skipping.train.shards


def test_dynamic_masks_take_their_settings_from_the_manifest(
    small_records, known_records, tmp_path
):
    static = read(small_records, known_records, tmp_path)
    keys = {k: v for k, v in static.train.keys.items() if "masked" not in k}
    path = known_records / "manifest.json"
    changes = {"masking": "dynamic", "masked_lm_prob": 0.3, "do_whole_word_mask": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes, "keys": keys}))
    data = read(small_records, known_records, tmp_path, max_predictions_per_seq=9, mode="train")
    assert dataclasses.astuple(data.train.masking) == (0.3, True)
    assert data.train.fingerprint != static.train.fingerprint
    settings = config(small_records, known_records)
    assert isinstance(given_files(settings, settings.phases[0]), DataFiles)
