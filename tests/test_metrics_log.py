"""Logs of JSON lines: each step once, whatever was killed when, local and on gs://."""

import contextlib
import json
import math
import os
import random
import resource
import time

import numpy as np
import pytest
import tensorflow as tf

from pretraining import files, metrics_log
from pretraining.errors import InputError
from pretraining.metrics_log import MetricsLog, read
from tests.gcs_server import gcs  # noqa: F401


def steps_of(path):
    return [record["step"] for record in read(str(path))]


def fill(log, steps):
    for step in steps:
        log.write(step, {"loss": step / 2})


def test_a_line_is_a_json_object_with_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), 0)
    assert log.last == {} and path.read_text() == ""
    log.write(0, {"names": ["a/kernel", "é"]})
    log.write(20, {"loss": 1.5, "phase": 1, "grad_norm": math.nan, "ratio": [1.0, math.inf]})
    log.write(40, {"loss": np.float32(0.5), "norm": np.array([1.0, np.nan], np.float32)})
    assert log.last == {"loss": 0.5, "norm": [1.0, None]}
    # Whole before the log is closed.
    lines = path.read_text().splitlines()
    log.close()
    # A parser that knows no NaN, as those of browsers and of jq.
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert found == [
        {"step": 0, "names": ["a/kernel", "é"]},
        {"step": 20, "loss": 1.5, "phase": 1, "grad_norm": None, "ratio": [1.0, None]},
        {"step": 40, "loss": 0.5, "norm": [1.0, None]},
    ]
    assert read(str(path)) == found
    assert read(str(tmp_path / "none.jsonl")) == []


def test_a_start_drops_what_an_earlier_one_wrote_beyond_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), 0)
    fill(log, range(1, 7))
    log.close()
    log = MetricsLog(str(path), 4)
    assert log.last == {"loss": 2.0}
    assert steps_of(path) == [1, 2, 3, 4]
    log.write(4, {"loss": -1.0})  # stands already
    log.write(6, {"loss": -3.0})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
        (6, -3.0),
    ]
    MetricsLog(str(path), 0).close()
    assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_is_written_where_nothing_is_to_be_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), 0)
    fill(log, [1, 2])
    log.close()
    before = os.stat(path)
    MetricsLog(str(path), 2).close()
    assert (os.stat(path).st_ino, os.stat(path).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


DAMAGED = {
    "torn": b'{"step": 3, "lo',
    "torn before the end of its line": b'{"step": 3, "loss": 1.5',
    "no JSON": b"hello\n",
    "no object": b"[3]\n3\nnull\n",
    "no step": b'{"loss": 1.0}\n{"step": "3"}\n{"step": true}\n{"step": 2.5}\n{"step": -1}\n',
    "bad bytes": b'{"step": 3, "name": "\xff\xfe"}\n\x80\n',
    "zeros of a lost page": b"\0" * 100,
    "deep": b"[" * 100_000 + b"\n",
    "empty lines": b"\n\n \n",
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("place", ["end", "middle"])
def test_damaged_lines_are_dropped_and_no_other(tmp_path, damage, place):
    path = tmp_path / "metrics.jsonl"
    one, two = b'{"step": 1, "loss": 0.5}\n', b'{"step": 2, "loss": 1.0}\n'
    newline = b"" if damage.endswith(b"\n") or place == "end" else b"\n"
    path.write_bytes(one + (two + damage if place == "end" else damage + newline + two))
    assert read(str(path)) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    log = MetricsLog(str(path), 9)
    assert log.last == {"loss": 1.0}
    log.write(10, {"loss": 5.0})
    log.close()
    assert path.read_bytes() == one + two + b'{"step": 10, "loss": 5.0}\n'


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}')
    log = MetricsLog(str(path), 2)
    fill(log, [3])
    log.close()
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.open()] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 1.5},
    ]


@contextlib.contextmanager
def full_disk(limit):
    """A limit on the size of a file plays the full disk; Python ignores the signal of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_what_was_written(tmp_path):
    path, written = tmp_path / "metrics.jsonl", []
    log = MetricsLog(str(path), 0)
    with full_disk(1000), pytest.raises(InputError) as failure:
        for step in range(1000):
            fill(log, [step])
            written.append(step)
    line = str(failure.value)
    assert "\n" not in line and "metrics.jsonl cannot be written" in line and "intact" in line
    assert len(written) > 30
    log = MetricsLog(str(path), 1000)
    fill(log, [1000])
    log.close()
    assert steps_of(path) == [*written, 1000]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it, and the log is never looked at again."""


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Makes a local folder a bucket: whole objects only, and a kill before any change to them."""
    (tmp_path / "metrics.jsonl.parts").mkdir()
    state = {"changes left": math.inf, "now": 0.0, "uploads": 0}

    def change(plain):
        def changed(*arguments, **settings):
            if state["changes left"] < 1:
                raise Killed
            state["changes left"] -= 1
            state["uploads"] += plain is write
            return plain(*arguments, **settings)

        return changed

    write, remove = files.write, tf.io.gfile.remove
    monkeypatch.setattr(files, "on_gcs", lambda path: True)
    monkeypatch.setattr(files, "write", change(write))
    monkeypatch.setattr(tf.io.gfile, "remove", change(remove))
    monkeypatch.setattr(time, "monotonic", lambda: state["now"])
    return state


@pytest.mark.parametrize("seed", range(30))
def test_parts_lose_and_repeat_no_step_whenever_the_run_is_killed(
    tmp_path, storage, monkeypatch, seed
):
    """Random intervals, part sizes and kills; the oracle is the list of steps up to the checkpoint."""
    rng = random.Random(seed)
    monkeypatch.setattr(metrics_log, "PART_BYTES", rng.choice([1, 60, 10_000]))
    path, end, saved, starts = tmp_path / "metrics.jsonl", 60, 0, 0
    while saved < end:
        starts += 1
        storage["changes left"] = rng.randrange(30) if starts < 30 else math.inf
        log = None
        try:
            log = MetricsLog(str(path), saved)
            assert steps_of(path) == list(range(1, saved + 1)), "cut to the checkpoint"
            for step in range(saved + 1, end + 1):
                storage["now"] += rng.choice([1, 20, 40])
                log.write(step, {"loss": step + saved / 100})
                if step % 10 == 0 or step == end:
                    log.flush()
                    saved = step
            log.close()
        except Killed:
            pass
        found = read(str(path))
        assert [r["step"] for r in found][:saved] == list(range(1, saved + 1)), "nothing lost"
        assert len({r["step"] for r in found}) == len(found), "nothing twice"
    storage["changes left"] = math.inf
    MetricsLog(str(path), end).close()
    assert [json.loads(line)["step"] for line in path.open()] == list(range(1, end + 1))
    assert not list((tmp_path / "metrics.jsonl.parts").iterdir())


def test_uploads_are_seldom_and_small(tmp_path, storage, monkeypatch):
    monkeypatch.setattr(metrics_log, "PART_BYTES", 500)
    log = MetricsLog(str(tmp_path / "metrics.jsonl"), 0)
    storage["uploads"] = 0
    for step in range(1, 601):  # a step a second
        storage["now"] += 1
        fill(log, [step])
    assert 600 / metrics_log.UPLOAD_SECONDS - 1 <= storage["uploads"] <= 20
    sizes = [part.stat().st_size for part in (tmp_path / "metrics.jsonl.parts").iterdir()]
    assert max(sizes) < 500 + 30 * 30
    log.close()
    assert steps_of(tmp_path / "metrics.jsonl") == list(range(1, 601))


def test_a_log_on_gs_through_a_kill_and_failing_requests(gcs, monkeypatch):  # noqa: F811
    path = f"{gcs.bucket}/run/metrics.jsonl"
    gcs.deny("storage.buckets.get")
    log = MetricsLog(path, 0)
    fill(log, [1, 2])
    log.flush()
    fill(log, [3])
    assert gcs.names(gcs.bucket) == [
        "run/metrics.jsonl",
        "run/metrics.jsonl.parts/0000000001.jsonl",
    ]
    assert steps_of(path) == [1, 2]
    log.flush()  # and killed
    assert gcs.content(path) == b""
    gcs.fail_every(5)
    log = MetricsLog(path, 2)
    assert log.last == {"loss": 1.0}
    assert gcs.names(gcs.bucket) == ["run/metrics.jsonl"]
    monkeypatch.setattr(metrics_log, "UPLOAD_SECONDS", 0.0)
    monkeypatch.setattr(metrics_log, "PART_BYTES", 1)
    gcs.fail_every(5, after=True)
    fill(log, [3, 4])
    assert steps_of(path) == [1, 2, 3, 4]
    assert len(gcs.names(f"{path}.parts/")) == 2
    log.close()
    assert gcs.names(gcs.bucket) == ["run/metrics.jsonl"]
    lines = gcs.content(path).decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    gcs.fail_every(0)
    gcs.deny("storage.objects.create")
    with pytest.raises(
        InputError, match=r"metrics\.jsonl cannot be written.*storage\.objects\.create"
    ):
        fill(log, [5])
