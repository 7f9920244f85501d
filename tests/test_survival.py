"""A run that is killed, preempted and started again ends in the very bits of one that ran through."""

import json
import os
import pathlib
import re
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
STEPS, SAVE_EVERY, EVAL_EVERY, LOOP = 120, 10, 60, 4
RATES = ("examples_per_sec", "tokens_per_sec", "model_flops_utilization")
# Imports once and forks for each run; TensorFlow starts nothing before it is used. Takes lines of
# [flags, environment, file for what it prints] and answers with the process and how that ended.
STARTER = """
import json, os, sys
from pretraining import run, training
for line in sys.stdin:
    flags, environment, log = json.loads(line)
    child = os.fork()
    if not child:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(environment)
        status = run.main(["run", *flags])
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    """Starts one run after the other, each in a process of its own."""

    def __init__(self, log):
        self._log = log
        self._running: int | None = None
        environment = {k: v for k, v in os.environ.items() if k != "GCE_METADATA_HOST"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "NO_GCE_CHECK": "true", "PYTHONUNBUFFERED": "1"},
        )

    def start(self, flags, **environment):
        """Starts a run; returns its process."""
        self._log.write_text("")
        line = json.dumps([flags, environment, str(self._log)])
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        self._running = int(self._process.stdout.readline())
        return self._running

    def end(self):
        """Waits for the end of the run; returns its status, below 0 a signal, and what it printed."""
        status, self._running = int(self._process.stdout.readline()), None
        printed = self._log.read_text()
        assert "Traceback" not in printed, printed
        return status, printed

    def close(self):
        """Ends, and with it a run that a failed test has left."""
        if self._running:
            os.kill(self._running, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture
def starter(tmp_path):
    starter = Starter(tmp_path / "printed.txt")
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
        eval_every_steps=EVAL_EVERY,
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
    """Whether the run has begun a checkpoint that cannot be seen yet."""
    begun = [path.name for path in (out / "checkpoints").glob("ckpt-*_temp")]
    return any(int(name[5:-5]) not in checkpoints_of(out) for name in begun)


def is_ahead(out):
    """Whether a loop after the newest checkpoint of this start has been logged."""
    logged = [line["step"] for line in lines_of(out, "metrics")]
    return bool(logged) and logged[-1] > max(checkpoints_of(out), default=0) > SAVE_EVERY


def kill_when(process, condition):
    """Kills a process at a moment that is looked at while it stands still."""
    for _ in range(60_000):
        if condition():
            os.kill(process, signal.SIGSTOP)
            time.sleep(0.05)  # for a thread in the middle of a call
            if condition():
                os.kill(process, signal.SIGKILL)
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
    out, whole = tmp_path / "broken", tmp_path / "whole"
    broken_flags = [*flags, f"--output_dir={out}"]

    kill_when(starter.start(broken_flags), lambda: is_saving(out))
    assert starter.end()[0] == -signal.SIGKILL
    begun = checkpoints_of(out)

    kill_when(starter.start(broken_flags), lambda: is_ahead(out))
    status, printed = starter.end()
    assert status == -signal.SIGKILL
    assert not begun or f"Going on from {out}/checkpoints/ckpt-{begun[-1]}\n" in printed
    assert not list((out / "checkpoints").glob("*_temp"))
    saved = checkpoints_of(out)[-1]

    answers = {
        "preempted": [(200, b"FALSE"), (200, b"TRUE")],
        "maintenance-event": [(200, b"NONE")],
    }
    with metadata_server(answers) as (host, _):
        starter.start(broken_flags, GCE_METADATA_HOST=host)
        status, printed = starter.end()
    assert status == 75, printed
    assert f"Going on from {out}/checkpoints/ckpt-{saved}\n" in printed
    stopped = re.search(r"preemption notice: stopped after (\d+) of 120 updates and saved", printed)
    reached = int(stopped[1])
    assert saved < reached < STEPS and checkpoints_of(out)[-1] == reached

    starter.start(broken_flags)
    status, printed = starter.end()
    assert status == 0 and f"Going on from {out}/checkpoints/ckpt-{reached}\n" in printed
    starter.start([*flags, f"--output_dir={whole}"])
    assert starter.end()[0] == 0

    ends = [
        tf.train.load_checkpoint(f"{folder}/checkpoints/ckpt-{STEPS}") for folder in (out, whole)
    ]
    names = set(ends[0].get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    assert names == set(ends[1].get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    assert len(names) > 60  # weights, two moments of each, counters
    for name in names:
        np.testing.assert_array_equal(*(end.get_tensor(name) for end in ends), err_msg=name)
    for name in ("evaluations", "layers"):
        assert lines_of(out, name) == lines_of(whole, name) != [], name
    assert without_rates(lines_of(out, "metrics")) == without_rates(lines_of(whole, "metrics"))
    assert points_of(out) == points_of(whole)
