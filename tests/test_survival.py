"""A run that is killed, preempted and started again ends in the very bits of one that ran through."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from tests.test_interruption import metadata_server
from tests.test_run import short

ROOT = pathlib.Path(__file__).parents[1]
STEPS, SAVE_EVERY, LOOP = 80, 10, 4
RATES = ("examples_per_sec", "tokens_per_sec", "model_flops_utilization")
# Imports once and forks for each run; TensorFlow starts nothing before it is used. A line of
# [flags, environment, file for what it prints] is answered with the process, one that is the number
# of a process with how that has ended. The report of a run, not looked at here, takes seconds.
STARTER = """
import json, os, sys
from pretraining import run, run_summary, training
run_summary.write_report = lambda directory: None
for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
        continue
    flags, environment, log = asked
    child = os.fork()
    if not child:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(environment)
        status = run.main(["run", *flags])
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
"""


class Starter:
    """Starts runs, each in a process of its own."""

    def __init__(self):
        environment = {k: v for k, v in os.environ.items() if k != "GCE_METADATA_HOST"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "NO_GCE_CHECK": "true", "PYTHONUNBUFFERED": "1"},
        )
        self._alive: set[int] = set()

    def _ask(self, asked):
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, flags, log, **environment):
        """Starts a run that prints into an empty file; returns its process."""
        log.write_text("")
        process = self._ask([flags, environment, str(log)])
        self._alive.add(process)
        return process

    def status(self, process):
        """Waits for the end of a run; returns its exit status, or the signal below 0."""
        status = self._ask(process)
        self._alive.remove(process)
        return status

    def close(self):
        """Ends, and with it the runs that a failed test has left."""
        for process in self._alive:
            os.kill(process, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture
def starter():
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture
def flags(small_records, tmp_path):
    """The flags of a run with dropout, compiled by XLA; without --output_dir."""
    bert = json.loads((small_records.folder / "bert_config.json").read_text())
    bert |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (tmp_path / "bert_config.json").write_text(json.dumps(bert))
    given = short(
        small_records,
        "",
        STEPS,
        save_every_steps=SAVE_EVERY,
        mode="train",
        steps_per_loop=LOOP,
        log_layers_every_steps=LOOP,
        jit_compile=True,
        bert_config_file=f"{tmp_path}/bert_config.json",
    )
    return [flag for flag in given if not flag.startswith("--output_dir")]


def checkpoints_of(out):
    """The steps of the checkpoints that can be seen."""
    names = (path.name for path in (out / "checkpoints").glob("ckpt-*.index"))
    return sorted(int(re.fullmatch(r"ckpt-(\d+)\.index", name)[1]) for name in names)


def lines_of(out, name):
    """The whole lines of a log, which may be growing."""
    try:
        text = (out / f"{name}.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def is_saving(out):
    """Whether a checkpoint after another one has been begun and cannot be seen yet."""
    begun, seen = list((out / "checkpoints").glob("ckpt-*_temp")), checkpoints_of(out)
    return bool(seen) and any(int(path.name[5:-5]) not in seen for path in begun)


def stop_when(process, condition):
    """Lets a process stand still at a moment."""
    for _ in range(60_000):
        if condition():
            os.kill(process, signal.SIGSTOP)
            time.sleep(0.05)  # for a thread in the middle of a call
            if condition():
                return
            os.kill(process, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError("that moment did not come")


def points_of(out):
    """The tags, steps and values of all TensorBoard events, rates aside, in order."""
    found = []
    for path in (out / "tensorboard").rglob("*tfevents*"):
        for content in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(content)
            for value in event.summary.value:
                if value.tag not in RATES:
                    found.append((value.tag, event.step, *value.tensor.float_val))
    return sorted(found)


def without_rates(lines):
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


def test_after_kills_and_a_preemption_the_end_is_that_of_an_unbroken_run(starter, flags, tmp_path):
    out, whole, log = tmp_path / "broken", tmp_path / "whole", tmp_path / "printed.txt"
    broken = [*flags, f"--output_dir={out}"]

    # What stands on the disk while the unbroken run makes a checkpoint is what a kill leaves.
    unbroken = starter.start([*flags, f"--output_dir={whole}"], tmp_path / "whole.txt")
    stop_when(unbroken, lambda: is_saving(whole))
    shutil.copytree(whole, out)
    os.kill(unbroken, signal.SIGCONT)
    assert starter.status(unbroken) == 0
    assert is_saving(out)
    saved = checkpoints_of(out)[-1]
    assert lines_of(out, "metrics")[-1]["step"] > saved  # logs go beyond what can be restored

    process = starter.start(broken, log)
    stop_when(process, lambda: "Going on from" in log.read_text())
    os.kill(process, signal.SIGKILL)
    assert starter.status(process) == -signal.SIGKILL

    answers = {
        "preempted": [(200, b"FALSE"), (200, b"TRUE")],
        "maintenance-event": [(200, b"NONE")],
    }
    with metadata_server(answers) as (host, _):
        process = starter.start(broken, log, GCE_METADATA_HOST=host)
        status, printed = starter.status(process), log.read_text()
    assert status == 75, printed
    assert f"Going on from {out}/checkpoints/ckpt-{saved}\n" in printed
    assert not list((out / "checkpoints").glob("*_temp*"))
    stopped = re.search(r"preemption notice: stopped after (\d+) of 80 updates and saved", printed)
    reached = int(stopped[1])
    assert saved < reached < STEPS and checkpoints_of(out)[-1] == reached

    status, printed = starter.status(starter.start(broken, log)), log.read_text()
    assert status == 0 and f"Going on from {out}/checkpoints/ckpt-{reached}\n" in printed, printed

    ends = [
        tf.train.load_checkpoint(f"{folder}/checkpoints/ckpt-{STEPS}") for folder in (out, whole)
    ]
    names = set(ends[0].get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    assert names == set(ends[1].get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    assert len(names) > 60  # weights, two moments of each, counters
    for name in names:
        np.testing.assert_array_equal(*(end.get_tensor(name) for end in ends), err_msg=name)
    assert lines_of(out, "layers") == lines_of(whole, "layers") != []
    assert without_rates(lines_of(out, "metrics")) == without_rates(lines_of(whole, "metrics"))
    assert points_of(out) == points_of(whole)
