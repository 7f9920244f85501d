"""The comparison that proves a resume, on differences that it must find, and its plan of kills."""

import json
import random

import pytest
import tensorflow as tf

from pretraining import resume_check


def a_run(folder, value=1.0, loss=2.0, rate=5.0):
    (folder / "checkpoints").mkdir(parents=True)
    state = tf.train.Checkpoint(a=tf.Variable([0.0, value]), b=tf.Variable(7, dtype=tf.int64))
    tf.train.CheckpointManager(state, str(folder / "checkpoints"), 1).save(checkpoint_number=9)
    lines = [{"step": s, "loss": loss if s == 9 else 3.0, "examples_per_sec": rate} for s in (3, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_equal_runs_differ_in_their_rates_only(tmp_path):
    one, other = a_run(tmp_path / "1"), a_run(tmp_path / "2", rate=6.0)
    assert resume_check.checkpoint_differences(one, other) == (2, [])
    assert resume_check.log_differences(one, other, "metrics.jsonl") == (2, [])


def test_the_last_bit_of_a_weight_and_of_a_loss_are_found(tmp_path):
    one = a_run(tmp_path / "1")
    other = a_run(tmp_path / "2", value=1.0000001, loss=2.0000000000000004)
    _, (difference,) = resume_check.checkpoint_differences(one, other)
    assert difference.startswith("a/.ATTRIBUTES/VARIABLE_VALUE")
    _, (difference,) = resume_check.log_differences(one, other, "metrics.jsonl")
    assert difference.startswith("metrics.jsonl line 2")


def test_a_step_that_stands_twice_or_not_is_found(tmp_path):
    one, other = a_run(tmp_path / "1"), a_run(tmp_path / "2")
    path = other / "metrics.jsonl"
    path.write_text(path.read_text() * 2)
    assert len(resume_check.log_differences(one, other, "metrics.jsonl")[1]) == 2
    path.unlink()
    assert len(resume_check.log_differences(one, other, "metrics.jsonl")[1]) == 2
    for file in (other / "checkpoints").iterdir():
        file.unlink()
    assert resume_check.checkpoint_differences(one, other)[1]


def test_kills_are_spread_over_the_run_and_what_it_does():
    whole = resume_check.Whole(steps=600, boundaries=(500,), loop_steps=20, loop_seconds=1.0)
    kills = resume_check.plan_kills(whole, 20, random.Random(1))
    steps = [step for _, step in kills]
    assert len(kills) == 20 and steps == sorted(steps) and steps[0] >= 0 and steps[-1] < 600
    moments = {moment for moment, _ in kills}
    assert moments == {
        resume_check.TRAINS,
        resume_check.SAVES,
        resume_check.STARTS,
        resume_check.BOUNDARY,
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kills=0", "--folder=x"], "--kills=0"),
        (["--kills=2"], "--folder"),
        (["--folder=gs://x"], "--folder=gs://x"),
        (["--folder={tmp}/new", "--", "--output_dir=x"], "--output_dir"),
        (["--folder={tmp}/new", "--", "--recipe=none"], "--recipe=none"),
    ],
)
def test_flags_that_cannot_work_give_one_line(tmp_path, capsys, flags, words):
    argv = ["resume_check", *(flag.format(tmp=tmp_path) for flag in flags)]
    assert resume_check.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
