"""Event files that TensorBoard reads, each step once, whatever was killed when, local and on gs://."""

import collections
import contextlib
import math
import os
import random
import re
import resource
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretraining import files, tensorboard_log
from pretraining.errors import InputError
from pretraining.tensorboard_log import TensorBoardLog
from tests.gcs_server import gcs  # noqa: F401


def curves(folder):
    """What TensorBoard shows of a folder: {tag: [(step, value)]}, without dropping what is double."""
    found = EventAccumulator(
        str(folder), size_guidance={"tensors": 0}, purge_orphaned_data=False
    ).Reload()
    return {
        tag: [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
        if found.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


def fill(log, steps):
    for step in steps:
        log.scalars(step, {"loss": step / 2, "trust_ratio/a": step})


def steps_of(folder):
    found = curves(folder)
    assert found["loss"] == [(s, s / 2) for s, _ in found["loss"]]
    assert [s for s, _ in found["trust_ratio/a"]] == [s for s, _ in found["loss"]]
    return [s for s, _ in found["loss"]]


def event_files(folder):
    return sorted(name for name in os.listdir(folder))


def test_tensorboard_shows_what_was_written(tmp_path):
    """The same events as those of TensorFlow's own writer, but for the time of day."""
    log = TensorBoardLog(str(tmp_path / "ours"), 0)
    points = {3: {"loss": 0.25, "a/b": 1e-30}, 6: {"loss": math.nan, "a/b": np.float32(2.0)}}
    for step, values in points.items():
        log.scalars(step, {**values, "unknown": None})
    log.close()
    log.close()
    writer = tf.summary.create_file_writer(str(tmp_path / "theirs"))
    with writer.as_default():
        for step, values in points.items():
            for tag, value in values.items():
                tf.summary.scalar(tag, value, step=step)
    writer.close()
    ours, theirs = (curves(tmp_path / name) for name in ("ours", "theirs"))
    np.testing.assert_equal(ours, theirs)
    assert ours["a/b"] == [(3, float(np.float32(1e-30))), (6, 2.0)]
    [name] = event_files(tmp_path / "ours")
    assert re.fullmatch(rf"events\.out\.tfevents\.\d{{10}}\..+\.{os.getpid()}\.\d+\.v2", name)


def test_a_start_drops_what_an_earlier_one_wrote_beyond_it(tmp_path):
    log = TensorBoardLog(str(tmp_path), 0)
    fill(log, range(1, 7))
    log.close()
    log = TensorBoardLog(str(tmp_path), 4)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    fill(log, [4, 5, 6, 7])  # 4 stands already
    log.flush()
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    fill(log, [8])
    log.close()
    assert len(event_files(tmp_path)) == 2
    log = TensorBoardLog(str(tmp_path), 4)
    log.close()
    assert len(event_files(tmp_path)) == 1
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    TensorBoardLog(str(tmp_path), 0).close()
    assert event_files(tmp_path) == []


def test_files_of_others_stay_as_they_are_where_nothing_is_to_be_dropped(tmp_path):
    writer = tf.summary.create_file_writer(str(tmp_path), filename_suffix=".other")
    with writer.as_default():
        for step in (1, 5):
            tf.summary.scalar("theirs", step, step=step)
            tf.summary.text("words", "x", step=step)
    writer.close()
    (tmp_path / "plugins").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    [path] = tmp_path.glob("*.other")
    before = path.read_bytes(), path.stat().st_ino
    log = TensorBoardLog(str(tmp_path), 5)
    fill(log, [6])
    log.close()
    assert (path.read_bytes(), path.stat().st_ino) == before
    TensorBoardLog(str(tmp_path), 4).close()
    assert curves(tmp_path) == {"theirs": [(1, 1.0)]}
    assert event_files(tmp_path) == sorted([path.name, "notes.txt", "plugins"])


@pytest.mark.parametrize("kept", [0.4, 0.999])
def test_torn_files(tmp_path, kept):
    log = TensorBoardLog(str(tmp_path), 0)
    fill(log, range(1, 21))
    log.close()
    [name] = event_files(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    (tmp_path / "empty.tfevents").write_bytes(b"")
    (tmp_path / "other.tfevents").write_bytes(b"no events at all, but some bytes of text")
    there = len(steps_of(tmp_path))
    assert 5 < there < 20
    log = TensorBoardLog(str(tmp_path), there)
    fill(log, range(there + 1, 21))
    log.close()
    assert steps_of(tmp_path) == list(range(1, 21))
    TensorBoardLog(str(tmp_path), 3).close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_full_disk_is_one_line_and_leaves_what_was_written(tmp_path):
    """A limit on the size of a file plays the full disk; Python ignores the signal of it."""
    log = TensorBoardLog(str(tmp_path), 0)
    fill(log, range(1, 11))
    log.flush()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = os.stat(tmp_path / event_files(tmp_path)[0]).st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    try:
        with pytest.raises(InputError) as failure:
            fill(log, range(11, 21))
            log.flush()
        with contextlib.suppress(InputError):
            log.close()
        with pytest.raises(InputError, match="cannot be written"):  # no space for the shorter file
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
            TensorBoardLog(str(tmp_path), 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = str(failure.value)
    assert "\n" not in line and "cannot be written" in line and "intact" in line
    assert steps_of(tmp_path)[:10] == list(range(1, 11))
    log = TensorBoardLog(str(tmp_path), 10)
    fill(log, range(11, 21))
    log.close()
    assert steps_of(tmp_path) == list(range(1, 21))
    assert not (tmp_path / ".unfinished").exists()


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it, and the log is never looked at again."""


@pytest.mark.parametrize("storage", ["disk", "bucket"])
@pytest.mark.parametrize("seed", range(4))
def test_no_step_is_lost_or_twice_whenever_the_run_is_killed(tmp_path, monkeypatch, storage, seed):
    """Random intervals, part sizes and kills; the oracle is the list of steps up to the checkpoint."""
    rng = random.Random(seed)
    state = collections.Counter()
    monkeypatch.setattr(time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(tensorboard_log, "PART_BYTES", rng.choice([500, 2000, 100_000]))
    if storage == "bucket":  # a local folder with whole objects only
        monkeypatch.setattr(files, "on_gcs", lambda path: path == str(tmp_path) or "tfev" in path)
        monkeypatch.setattr(files, "make_folder", lambda path: None)

    def change(plain):
        def changed(*arguments, **settings):
            if state["changes left"] < 1:
                raise Killed
            state["changes left"] -= 1
            return plain(*arguments, **settings)

        return changed

    monkeypatch.setattr(tensorboard_log, "_write", change(tensorboard_log._write))
    monkeypatch.setattr(tf.io.gfile, "remove", change(tf.io.gfile.remove))
    monkeypatch.setattr(TensorBoardLog, "_append", change(TensorBoardLog._append))
    end, saved, starts = 30, 0, 0
    while saved < end:
        starts += 1
        state["changes left"] = rng.randrange(6) if starts < 10 else 10**9
        try:
            log = TensorBoardLog(str(tmp_path), saved)
            for step in range(saved + 1, end + 1):
                state["now"] += rng.choice([1, 20, 40])
                fill(log, [step])
                if step % 10 == 0:
                    log.flush()
                    saved = step
            log.close()
        except Killed:
            pass
        if saved:
            assert steps_of(tmp_path)[:saved] == list(range(1, saved + 1))
    assert steps_of(tmp_path) == list(range(1, end + 1))


def test_a_log_on_gs_through_a_kill_and_failing_requests(gcs, monkeypatch):  # noqa: F811
    folder = f"{gcs.bucket}/run/tensorboard/train"
    gcs.deny("storage.buckets.get")
    log = TensorBoardLog(folder, 0)
    fill(log, [1, 2])
    assert gcs.names(gcs.bucket) == ["run/tensorboard/train/"]
    log.flush()
    fill(log, [3])
    assert len(gcs.names(gcs.bucket)) == 2
    log.flush()  # and killed
    assert len(gcs.names(gcs.bucket)) == 2
    assert steps_of(folder) == [1, 2, 3]
    gcs.fail_every(5)
    log = TensorBoardLog(folder, 2)
    monkeypatch.setattr(tensorboard_log, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(tensorboard_log, "PART_BYTES", 1)
    gcs.fail_every(5, after=True)
    fill(log, [3, 4])
    log.close()
    gcs.fail_every(0)
    assert len(gcs.names(gcs.bucket)) == 4
    assert steps_of(folder) == [1, 2, 3, 4]
    gcs.deny("storage.objects.create")
    with pytest.raises(InputError, match=r"cannot be written.*storage\.objects\.create"):
        fill(log, [5])
