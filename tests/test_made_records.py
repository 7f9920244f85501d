"""Records of ours on their way into training: static and dynamic masks, other readers."""

import json

import numpy as np
import pytest
import tensorflow as tf
from official.nlp.data import pretrain_dataloader

from pretraining import record_sets
from pretraining.batch_plan import BatchPlan
from pretraining.config import Config
from pretraining.data import given_files, read_data
from pretraining.examples import ExampleSettings
from pretraining.model import MODELS
from pretraining.run_directory import RunDirectory
from tests.conftest import LENGTH, PREDICTIONS, made_up_documents
from tests.test_run import metrics_of, short, train

SETTINGS = ExampleSettings(
    max_seq_length=LENGTH, max_predictions_per_seq=PREDICTIONS, masked_lm_prob=0.2, dupe_factor=2
)


@pytest.fixture(scope="module", params=["static", "dynamic"])
def made(request, small_records, tmp_path_factory):
    """Records of four shards, and what they are: (folder, masking)."""
    folder = tmp_path_factory.mktemp(request.param)
    tokens = small_records.words.tokens
    documents = [
        [" ".join(tokens[i] for i in sentence) for sentence in document]
        for document in made_up_documents(60, 5)
    ]
    record_sets.make_records(
        documents,
        small_records.words,
        SETTINGS,
        str(folder),
        masking=request.param,
        num_shards=4,
    )
    return folder, request.param


def flags(small_records, folder):
    return {
        "input_files": str(folder),
        "eval_files": str(folder),
        "vocab_file": f"{small_records.folder}/vocab.txt",
        "max_seq_length": LENGTH,
        "max_predictions_per_seq": PREDICTIONS,
    }


@pytest.fixture
def data(made, small_records, tmp_path):
    config = Config(**flags(small_records, made[0]))
    directory = RunDirectory(str(tmp_path / "run"))
    phase = config.phases[0]
    return read_data(given_files(config, phase), config, phase, MODELS["tiny"], directory)


def batches(dataset, count):
    return [{k: v.numpy() for k, v in batch.items()} for batch in dataset.take(count)]


def steps(data, start, count, replicas=1, hosts=1):
    """Global batches, as all replicas of all hosts get them together."""
    plan = BatchPlan(global_batch_size=8, num_replicas=replicas)
    per_host = [
        batches(
            data.train_input(plan, 3, start)(tf.distribute.InputContext(hosts, host)),
            count * replicas // hosts,
        )
        for host in range(hosts)
    ]
    turns = replicas // hosts
    return [
        {
            name: np.concatenate(
                [host[step * turns + i][name] for host in per_host for i in range(turns)]
            )
            for name in per_host[0][0]
        }
        for step in range(count)
    ]


def assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_every_feature_of_a_step_is_the_same_from_any_start_and_for_any_layout(data):
    whole = steps(data, 0, 12)
    assert len(data.train.lanes()) == 4
    assert_equal(steps(data, 9, 3), whole[9:])
    for replicas, hosts in ((2, 1), (4, 1), (2, 2), (4, 2)):
        assert_equal(steps(data, 7, 2, replicas, hosts), whole[7:9])


def original(batch):
    """The tokens before masking, a tuple a row."""
    rows = batch["input_word_ids"].copy()
    for row, (places, ids, weights) in enumerate(
        zip(
            batch["masked_lm_positions"],
            batch["masked_lm_ids"],
            batch["masked_lm_weights"],
            strict=True,
        )
    ):
        rows[row, places[weights > 0]] = ids[weights > 0]
    return [tuple(row) for row in rows.tolist()]


def test_dynamic_masks_change_from_epoch_to_epoch_and_static_ones_do_not(data, made):
    per_epoch = data.train.num_records // 8
    seen: dict[tuple, set] = {}
    for batch in steps(data, 0, 3 * per_epoch):
        for text, places in zip(
            original(batch), batch["masked_lm_positions"].tolist(), strict=True
        ):
            seen.setdefault(text, set()).add(tuple(places))
        counts = batch["masked_lm_weights"].sum(axis=1)
        used = batch["input_mask"].sum(axis=1)
        wanted = [min(PREDICTIONS, max(1, round(int(n) * 0.2))) for n in used]
        np.testing.assert_array_equal(counts, wanted)
    changed = np.mean([len(places) > 1 for places in seen.values()])
    if made[1] == "dynamic":
        assert changed > 0.9
    else:
        assert changed < 0.1  # two examples of the same short text, if any


def test_evaluation_masks_alike_each_time(data):
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    first, second = (
        batches(data.eval_input(plan)(tf.distribute.InputContext()), 5) for _ in range(2)
    )
    assert_equal(first, second)


def test_a_run_trains_on_them(made, small_records, tmp_path):
    out = tmp_path / "run"
    given = [f"--{name}={value}" for name, value in flags(small_records, made[0]).items()]
    assert train(*short(small_records, out, 12, virtual_devices=2), *given) == 0
    assert metrics_of(out)[-1]["step"] == 12
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["eval"]["most_frequent_token_accuracy"] < 1


def test_the_loader_of_tf_models_reads_the_same_examples(made):
    folder, masking = made
    if masking == "dynamic":
        pytest.skip("that loader needs masks in the records")
    config = pretrain_dataloader.BertPretrainDataConfig(
        input_path=f"{folder}/*.tfrecord",
        seq_length=LENGTH,
        max_predictions_per_seq=PREDICTIONS,
        global_batch_size=4,
        is_training=False,
        drop_remainder=False,
        use_next_sentence_label=True,
    )
    names = {
        "input_word_ids": "input_ids",
        "input_mask": "input_mask",
        "input_type_ids": "segment_ids",
        "masked_lm_positions": "masked_lm_positions",
        "masked_lm_ids": "masked_lm_ids",
        "masked_lm_weights": "masked_lm_weights",
        "next_sentence_labels": "next_sentence_labels",
    }
    loaded = list(pretrain_dataloader.BertPretrainDataLoader(config).load())
    theirs = {name: np.concatenate([b[name].numpy() for b in loaded]) for name in names}
    files = sorted(str(path) for path in folder.glob("*.tfrecord"))
    stored = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(files)]
    for name, key in names.items():
        features = [example.features.feature[key] for example in stored]
        ours = np.array([f.float_list.value or f.int64_list.value for f in features])
        rows, expected = theirs[name].reshape(len(ours), -1), ours.reshape(len(ours), -1)
        np.testing.assert_array_equal(
            rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)], err_msg=name
        )
