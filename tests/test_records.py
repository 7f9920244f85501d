"""Records that fit, and every way in which they may not."""

import shutil

import pytest
import tensorflow as tf

from pretraining import files, records
from pretraining.errors import InputError
from pretraining.record_checks import RecordCheck
from pretraining.record_format import RecordFormat
from tests.conftest import LENGTH, PREDICTIONS

FORMAT = RecordFormat(
    max_seq_length=LENGTH,
    max_predictions_per_seq=PREDICTIONS,
    vocab_size=65,
    type_vocab_size=2,
)


def rewritten(source, target, change, at):
    """Copies a file of records, one of them changed by a function of its `tf.train.Example`."""
    with tf.io.TFRecordWriter(str(target)) as writer:
        for index, record in enumerate(tf.data.TFRecordDataset(str(source)).as_numpy_iterator()):
            if index == at:
                example = tf.train.Example.FromString(record)
                record = change(example) or example.SerializeToString()
            writer.write(record)
    return str(target)


def check(*paths, record_format=FORMAT):
    return RecordCheck(record_format=record_format, flag="--input_files").run(paths)


def test_counts_labels_and_contents(small_records):
    paths = files.find_files(f"{small_records.folder}/train-*.tfrecord", "--input_files")
    found = check(*paths)
    read = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(paths)]
    assert found.num_records == len(read)
    labels = [
        label
        for e in read
        for label, weight in zip(
            e.features.feature["masked_lm_ids"].int64_list.value,
            e.features.feature["masked_lm_weights"].float_list.value,
            strict=True,
        )
        if weight
    ]
    assert found.label_counts.sum() == len(labels)
    assert found.label_counts[7] == labels.count(7)
    assert records.RecordSet.from_json(found.to_json(), 65).fingerprint == found.fingerprint


def test_the_fingerprint_is_of_the_contents_not_of_the_place(small_records, tmp_path):
    source = small_records.folder / "train-0.tfrecord"
    copy = shutil.copy(source, tmp_path / "elsewhere.tfrecord")
    changed = rewritten(
        source,
        tmp_path / "changed.tfrecord",
        lambda e: e.features.feature["input_ids"].int64_list.value.__setitem__(1, 9),
        at=3,
    )
    prints = [check(str(path)).fingerprint for path in (source, copy, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_the_cache_is_used_until_a_file_changes(small_records, tmp_path):
    path = shutil.copy(small_records.folder / "train-0.tfrecord", tmp_path / "a.tfrecord")
    cache = str(tmp_path / "cache.json")
    assert records.read_cache(cache, [str(path)], FORMAT) is None
    found = check(str(path))
    records.write_cache(cache, found, FORMAT)
    again = records.read_cache(cache, [str(path)], FORMAT)
    assert again.shards == found.shards and (again.label_counts == found.label_counts).all()
    shutil.copy(small_records.folder / "train-1.tfrecord", path)
    assert records.read_cache(cache, [str(path)], FORMAT) is None
    (tmp_path / "cache.json").write_text("{")
    assert records.read_cache(cache, [str(path)], FORMAT) is None


def test_files_are_found_by_name_glob_and_folder(small_records):
    folder = str(small_records.folder)
    everything = files.find_files(folder, "--input_files")
    assert len(everything) == 4
    assert files.find_files(f"{folder}/train-0.tfrecord,{folder}/e*", "--input_files") == [
        f"{folder}/eval.tfrecord",
        f"{folder}/train-0.tfrecord",
    ]
    with pytest.raises(InputError, match=r"--input_files=/nowhere/x\*: .* no file matches"):
        files.find_files(f"{folder}/eval.tfrecord,/nowhere/x*", "--input_files")


def set_value(key, index, value):
    def change(example):
        feature = example.features.feature[key]
        values = feature.float_list.value if "weights" in key else feature.int64_list.value
        values[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_value("input_ids", 3, 65), ["input_ids", "--vocab_file", "0 to 64", "Received: 65"]),
        (set_value("input_ids", 3, -1), ["input_ids", "Received: -1"]),
        (set_value("masked_lm_ids", 0, 700), ["masked_lm_ids", "Received: 700"]),
        (set_value("masked_lm_positions", 0, LENGTH), ["masked_lm_positions", "0 to 31"]),
        (set_value("segment_ids", 0, 2), ["segment_ids", "0 to 1"]),
        (set_value("next_sentence_labels", 0, 2), ["next_sentence_labels", "0 to 1"]),
        (set_value("masked_lm_weights", 0, float("nan")), ["masked_lm_weights", "nan"]),
        (
            lambda e: e.features.feature["input_ids"].int64_list.value.append(5),
            ["32 values of input_ids", "--max_seq_length=32", "Received: 33"],
        ),
        (
            lambda e: e.features.feature["masked_lm_ids"].int64_list.value.pop(),
            ["--max_predictions_per_seq=5", "Received: 4"],
        ),
        (lambda e: e.features.feature.pop("input_mask"), ["the feature input_mask"]),
        (lambda e: b"no example at all", ["expected a tf.train.Example"]),
    ],
)
def test_a_record_that_does_not_fit_is_named(small_records, tmp_path, change, words):
    def changed(example):
        result = change(example)
        return result if isinstance(result, bytes) else None

    path = rewritten(small_records.folder / "train-1.tfrecord", tmp_path / "x", changed, at=17)
    with pytest.raises(InputError) as raised:
        check(str(small_records.folder / "train-0.tfrecord"), path)
    text = str(raised.value)
    assert text.startswith(f"--input_files={path}: record 17: ") and "\n" not in text
    for word in words:
        assert word in text, text


def test_a_damaged_byte_is_named_by_file_and_record(small_records, tmp_path):
    source = small_records.folder / "train-1.tfrecord"
    data = bytearray(source.read_bytes())
    sizes = [len(r.numpy()) + 16 for r in tf.data.TFRecordDataset(str(source))]
    data[sum(sizes[:11]) + 40] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(InputError, match="flipped: record 11 is damaged"):
        check(str(tmp_path / "flipped"))
    for rest in (20, 3):  # inside a record, and inside its header
        (tmp_path / "cut").write_bytes(source.read_bytes()[: sum(sizes[:5]) + rest])
        with pytest.raises(InputError, match="cut: record 5 is damaged"):
            check(str(tmp_path / "cut"))


@pytest.mark.parametrize("content", [b"This is prose, and no record.\n" * 50, b"\x1f\x8b\x08\x00"])
def test_a_file_that_is_no_tfrecord_is_named(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"notes\.txt: expected a TFRecord file"):
        check(str(path))


def test_empty_files_are_refused_only_where_all_are_empty(small_records, tmp_path):
    empty = tmp_path / "empty.tfrecord"
    empty.touch()
    assert check(str(empty), str(small_records.folder / "train-0.tfrecord")).num_records > 0
    with pytest.raises(InputError, match="Received: only empty files"):
        check(str(empty))


def test_records_with_the_later_names_of_tf_models_load(small_records, tmp_path):
    def rename(example):
        features = example.features.feature
        for old, new in (("input_ids", "input_word_ids"), ("segment_ids", "input_type_ids")):
            features[new].CopyFrom(features[old])
            del features[old]

    source, path = small_records.folder / "train-0.tfrecord", tmp_path / "later.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in tf.data.TFRecordDataset(str(source)).as_numpy_iterator():
            example = tf.train.Example.FromString(record)
            rename(example)
            writer.write(example.SerializeToString())
    assert check(str(path)).num_records == check(str(source)).num_records
