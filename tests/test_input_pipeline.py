"""The order of the rows is a function of seed and position, whoever reads them."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from pretraining import input_pipeline, lanes, record_checks
from pretraining.batch_plan import BatchPlan
from pretraining.errors import InputError
from pretraining.record_checks import RecordCheck
from tests.test_records import FORMAT

WINDOW = 16


def checked(paths, **options):
    """The set of these files, in windows that are small enough to cross many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_checks, "WINDOW", WINDOW)
        patch.setattr(record_checks, "LEAST_WINDOW", WINDOW)
        return RecordCheck(record_format=FORMAT, flag="--input_files", **options).run(paths)


@pytest.fixture(scope="module")
def train(small_records):
    paths = [f"{small_records.folder}/train-{i}.tfrecord" for i in range(3)]
    return checked(paths)


def global_batches(train, plan, start, count, seed=7, hosts=1):
    """The rows of each step, as all replicas of all hosts get them together."""
    iterators = [
        iter(
            input_pipeline.train_dataset(
                train, FORMAT, plan, seed, start, tf.distribute.InputContext(hosts, host)
            )
        )
        for host in range(hosts)
    ]
    per_host = plan.num_replicas // hosts
    return [
        np.concatenate([next(it)["input_word_ids"] for it in iterators for _ in range(per_host)])
        for _ in range(count)
    ]


def test_every_record_comes_once_an_epoch_and_in_another_order_the_next(train):
    plan = BatchPlan(global_batch_size=1, num_replicas=1)
    count = train.num_records
    rows = np.concatenate(global_batches(train, plan, 0, 2 * count))
    first, second = rows[:count], rows[count:]
    stored = np.array(
        [
            tf.train.Example.FromString(r.numpy()).features.feature["input_ids"].int64_list.value
            for r in tf.data.TFRecordDataset([s.path for s in train.shards])
        ]
    )

    def ordered(a):
        return a[np.lexsort(a.T)]

    np.testing.assert_array_equal(ordered(first), ordered(stored))
    np.testing.assert_array_equal(ordered(second), ordered(stored))
    assert not (first == second).all()
    assert not (first == stored).all()


@pytest.mark.parametrize("start", [1, 5, 13, 40])
def test_a_restart_goes_on_with_the_same_batches(train, start):
    """Also across windows of 16 and past the end of the first epoch."""
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    assert train.num_records < 40 * 8
    whole = global_batches(train, plan, 0, start + 4)
    np.testing.assert_array_equal(global_batches(train, plan, start, 4), whole[start:])


@pytest.mark.parametrize(("replicas", "hosts"), [(2, 1), (4, 1), (4, 2), (2, 2)])
def test_the_global_batch_does_not_depend_on_replicas_and_hosts(train, replicas, hosts):
    one = global_batches(train, BatchPlan(global_batch_size=8, num_replicas=1), 3, 5)
    plan = BatchPlan(global_batch_size=8, num_replicas=replicas)
    np.testing.assert_array_equal(global_batches(train, plan, 3, 5, hosts=hosts), one)


def test_another_seed_gives_another_order(train):
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    assert (
        global_batches(train, plan, 0, 1)[0] != global_batches(train, plan, 0, 1, seed=8)[0]
    ).any()


def test_batches_are_int32_of_static_shape_with_original_values(train):
    plan = BatchPlan(global_batch_size=8, num_replicas=2)
    dataset = input_pipeline.train_dataset(train, FORMAT, plan, 1, 0)
    for name, spec in dataset.element_spec.items():
        assert spec.shape.is_fully_defined() and spec.shape[0] == 4
        assert spec.dtype == (tf.float32 if "weights" in name else tf.int32)


@pytest.mark.parametrize("batch", [1, 7, 8, 1000])
def test_evaluation_sees_every_record_exactly_once(train, batch):
    plan = BatchPlan(global_batch_size=batch, num_replicas=1)
    seen = [
        row
        for b in input_pipeline.eval_dataset(train, FORMAT, plan)
        for row, weight in zip(b["input_word_ids"].numpy(), b["row_weights"].numpy(), strict=True)
        if weight
    ]
    stored = [
        tf.train.Example.FromString(r.numpy()).features.feature["input_ids"].int64_list.value
        for r in tf.data.TFRecordDataset([s.path for s in train.shards])
    ]
    np.testing.assert_array_equal(seen, np.array(stored))


def rows_of(paths):
    """The stored records, by file: [records, length] input ids."""
    return {
        path: np.array(
            [
                tf.train.Example.FromString(r.numpy())
                .features.feature["input_ids"]
                .int64_list.value
                for r in tf.data.TFRecordDataset(path)
            ]
        )
        for path in paths
    }


@pytest.fixture(scope="module")
def many(small_records, tmp_path_factory):
    """Eight files of 37 records each, all different: eight lanes."""
    folder = tmp_path_factory.mktemp("many")
    source = tf.data.TFRecordDataset(
        [f"{small_records.folder}/train-{i}.tfrecord" for i in range(3)]
    )
    template = [tf.train.Example.FromString(r.numpy()) for r in source.take(37)]
    for file in range(8):
        with tf.io.TFRecordWriter(f"{folder}/{file}.tfrecord") as writer:
            for record, example in enumerate(template):
                ids = example.features.feature["input_ids"].int64_list.value
                ids[1], ids[2] = 5 + file, 5 + record
                writer.write(example.SerializeToString())
    return checked([f"{folder}/{file}.tfrecord" for file in range(8)])


def test_shards_are_dealt_to_as_many_even_lanes_as_there_can_be(train, many):
    assert [len(lane) for lane in many.lanes()] == [1] * 8
    assert len(train.lanes()) == 1  # the files differ in size by more than a hundredth
    assert sorted(shard for lane in train.lanes() for shard in lane) == [0, 1, 2]
    more = dataclasses.replace(many, shards=many.shards * 5)
    assert [len(lane) for lane in more.lanes()] == [5] * 8
    uneven = dataclasses.replace(many, shards=many.shards[:7])
    assert [len(lane) for lane in uneven.lanes()] == [7]


@pytest.mark.parametrize("batch", [16, 4, 12, 7])
def test_lanes_give_the_same_batches_from_any_step_and_for_any_layout(many, batch):
    """Batches that the number of lanes divides, that divide it, and that do neither."""
    whole = global_batches(many, BatchPlan(global_batch_size=batch, num_replicas=1), 0, 90)
    for replicas, hosts in ((1, 1), (4, 2)):
        if batch % replicas == 0:
            plan = BatchPlan(global_batch_size=batch, num_replicas=replicas)
            some = global_batches(many, plan, 53, 3, hosts=hosts)
            np.testing.assert_array_equal(some, whole[53:56])
    # Each lane, and so each file, gives all of its records before one comes again.
    rows = np.concatenate(whole)[: 8 * 36]
    if batch in (16, 4):
        assert len({(row[1], row[2]) for row in rows}) == 8 * 36


def test_reading_many_files_at_once_changes_no_order(many, monkeypatch):
    plan = BatchPlan(global_batch_size=16, num_replicas=1)
    one_by_one = global_batches(many, plan, 5, 30)
    monkeypatch.setattr(lanes, "on_gcs", lambda path: True)
    np.testing.assert_array_equal(global_batches(many, plan, 5, 30), one_by_one)


def test_a_host_opens_the_files_of_its_own_lanes_only(many, tmp_path):
    """The other host's files are not there at all."""
    plan = BatchPlan(global_batch_size=16, num_replicas=4)
    both = global_batches(many, plan, 5, 12, hosts=2)
    for host in range(2):
        mine = {shard for lane in many.lanes()[4 * host : 4 * host + 4] for shard in lane}
        folder = tmp_path / str(host)
        folder.mkdir()
        shards = []
        for index, shard in enumerate(many.shards):
            path = folder / f"{index}.tfrecord"
            if index in mine:
                shutil.copy(shard.path, path)
            shards.append(dataclasses.replace(shard, path=str(path)))
        here = dataclasses.replace(many, shards=tuple(shards))
        context = tf.distribute.InputContext(2, host)
        batches = iter(input_pipeline.train_dataset(here, FORMAT, plan, 7, 5, context))
        for step in range(12):
            rows = np.concatenate([next(batches)["input_word_ids"] for _ in range(2)])
            np.testing.assert_array_equal(rows, both[step][8 * host : 8 * host + 8])


def test_a_start_far_into_the_run_reads_one_window_of_a_lane(many, monkeypatch):
    """A step in the millions costs what step 0 costs: nothing before it is read."""
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    epochs = 10**6 // 37
    far = global_batches(many, plan, epochs * 37, 37)
    rows = np.concatenate(far)
    assert len({(row[1], row[2]) for row in rows}) == 8 * 37
    assert not np.array_equal(rows, np.concatenate(global_batches(many, plan, 0, 37)))


def flip(path, record, inside=40):
    """Flips a bit of one of the records of `many`, which are all of one size."""
    data = bytearray(pathlib.Path(path).read_bytes())
    data[len(data) // 37 * record + inside] ^= 1
    pathlib.Path(path).write_bytes(data)


@pytest.mark.parametrize(
    ("record", "inside", "lost"),
    [
        (20, 40, [20]),
        (0, 40, [0]),
        (36, 40, [36]),
        (20, 2, range(20, 32)),  # the length itself, so all up to the next window that is known
    ],
)
def test_a_skipped_record_shifts_no_position(many, tmp_path, record, inside, lost):
    """All other rows stay where they are; the next good record of the window stands in."""
    folder = shutil.copytree(pathlib.Path(many.shards[0].path).parent, tmp_path / "damaged")
    moved = [str(folder / pathlib.Path(shard.path).name) for shard in many.shards]
    known = dataclasses.replace(
        many,
        shards=tuple(
            dataclasses.replace(s, path=p) for s, p in zip(many.shards, moved, strict=True)
        ),
    )
    flip(moved[3], record, inside)
    flip(moved[6], 16)
    flip(moved[6], 18)
    said = []
    skipping = checked(moved, known=known, on_corrupt=said.append)
    assert skipping.corrupt_records == len(lost) + 2
    assert len(said) == 3 and all(f"{moved[3]}: " in s or f"{moved[6]}: " in s for s in said)
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    clean = np.concatenate(global_batches(many, plan, 0, 80))
    rows = np.concatenate(global_batches(skipping, plan, 0, 80))
    differs = (rows != clean).any(axis=1)
    bad = {(5 + 3, 5 + r) for r in lost} | {(5 + 6, 5 + 16), (5 + 6, 5 + 18)}
    expected = np.array([(row[1], row[2]) in bad for row in clean])
    np.testing.assert_array_equal(differs, expected)
    stored = rows_of([many.shards[3].path])[many.shards[3].path]
    good = [r for r in range(record // 16 * 16, min(37, record // 16 * 16 + 16)) if r not in lost]
    stand_in = next((r for r in good if r > record), good[0])
    replaced = rows[(clean[:, 1] == 5 + 3) & (clean[:, 2] == 5 + record)]
    assert len(replaced) >= 2 and (replaced == stored[stand_in]).all()
    # It goes on in the same way from any step.
    np.testing.assert_array_equal(
        np.concatenate(global_batches(skipping, plan, 41, 5)), rows[8 * 41 : 8 * 46]
    )
    with pytest.raises(InputError, match=rf"{moved[3]}: .*record {record}"):
        checked(moved, known=known)


def test_evaluation_goes_past_skipped_records_too(many, tmp_path):
    folder = shutil.copytree(pathlib.Path(many.shards[0].path).parent, tmp_path / "damaged")
    paths = sorted(str(path) for path in folder.iterdir())
    flip(paths[2], 5)
    skipping = checked(paths, on_corrupt=lambda line: None)
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    batches = input_pipeline.eval_dataset(skipping, FORMAT, plan)
    rows = np.concatenate([b["input_word_ids"] for b in batches])
    assert len(rows) == 8 * 37 and tuple(rows[2 * 37 + 5][1:3]) == (5 + 2, 5 + 6)


def test_an_id_beyond_the_vocabulary_stops_the_input(many):
    smaller = dataclasses.replace(FORMAT, vocab_size=40)
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="input_word_ids out of range"):
        for batch in input_pipeline.train_dataset(many, smaller, plan, 7, 0).take(40):
            del batch


def test_damage_is_looked_for_in_the_files_that_a_step_reads(many):
    plan = BatchPlan(global_batch_size=2, num_replicas=1)
    together = dataclasses.replace(many, shards=many.shards[:7])  # one lane of seven files
    for step in (0, 20, 100, 127, 128):
        batch = global_batches(together, plan, step, 1)[0]
        read = {many.shards[row[1] - 5].path for row in batch}
        in_use = input_pipeline.shards_in_use(together, plan, 7, step)
        assert read <= set(in_use) and len(in_use) <= 2
    assert len(input_pipeline.shards_in_use(many, plan, 7, 100)) == 8
