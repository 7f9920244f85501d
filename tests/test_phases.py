"""Runs of several phases: their flags, their plans, their schedule, and the run itself."""

import dataclasses
import json

import numpy as np
import pytest

import lamb_tf.recipes as published
from pretraining import batch_plan, phases, recipes
from pretraining.config import Config
from pretraining.errors import InputError
from pretraining.flags import parse
from pretraining.optimization import build_schedule
from tests.conftest import LENGTH, PREDICTIONS
from tests.test_run import (
    assert_one_line,
    everything_under,
    metrics_of,
    short,
    train,
    weights_of,
)


def config(*flags):
    return parse(["run", *flags], "pretraining.run", Config)


def test_a_flag_given_by_hand_wins_over_its_recipe():
    plain = config("--recipe=demo_two_phase")
    assert plain.max_seq_length == (128, 512) and plain.num_phases == 2
    assert config("--recipe=demo_two_phase", "--learning_rate=0.02").learning_rate == (0.02, 0.02)
    by_hand = config("--recipe=demo_two_phase", "--num_train_steps=30,6", "--warmup_steps=4,2")
    assert [(p.first_step, p.end_step) for p in by_hand.phases] == [(0, 30), (30, 36)]
    # A value that equals the default of the flag is given by hand as well.
    assert config("--recipe=demo_two_phase", "--learning_rate=0.01").learning_rate == (0.01, 0.01)


def test_lists_by_hand_make_phases_without_a_recipe():
    made = config("--num_train_steps=90,10", "--max_seq_length=64,128", "--train_batch_size=16,8")
    assert [p.train_batch_size for p in made.phases] == [16, 8]
    assert made.warmup_steps == (11, 1) and made.as_flags()["max_seq_length"] == [64, 128]
    assert made.identity["num_train_steps"] == [90, 10]
    assert config().as_flags()["max_seq_length"] == 128


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--num_train_steps=9,9,9"],
            ["--num_train_steps=9,9,9", "--max_seq_length=128,512", "2 and 3"],
        ),
        (["--num_train_steps=9,x"], ["--num_train_steps=9,x", "comma-separated"]),
        (["--num_train_steps=9,"], ["--num_train_steps=9,", "comma-separated"]),
        (["--learning_rate=0.1,-1"], ["--learning_rate=-1.0", "more than 0"]),
        (["--num_train_steps=500,10"], ["--warmup_steps=20", "--num_train_steps=10"]),
        (["--max_seq_length=8,512"], ["--max_predictions_per_seq=20", "--max_seq_length=8"]),
        (["--rewarmup=false"], ["--learning_rate=0.01,0.003", "one value", "--rewarmup=false"]),
        (["--warmup_first_step=-101"], ["--warmup_first_step=-101", "--warmup_steps=100"]),
        (["--profile_steps=5:3"], ["--profile_steps=5:3", "a:b"]),
        (["--profile_steps=5"], ["--profile_steps=5", "a:b"]),
        (["--recipe=large"], ["--recipe=large", "demo, demo_two_phase, bert_large_512"]),
    ],
)
def test_flags_that_cannot_work_together_are_named(flags, words):
    expected = ["--recipe=demo_two_phase", *flags]
    with pytest.raises(InputError) as error:
        config(*expected)
    for word in words:
        assert word in str(error.value)


def test_every_published_recipe_becomes_flags():
    """Steps, batches, rates and warm-ups of the flags are those of the publication."""
    for run in published.RECIPES:
        if run.phases[0].sequence_length is None:
            continue  # images
        (name,) = [n for n, r in recipes.RECIPES.items() if r.about == run.name]
        made = config(f"--recipe={name}", "--dry_run")
        assert [(p.train_batch_size, p.num_train_steps, p.max_seq_length) for p in made.phases] == [
            tuple(dataclasses.astuple(p)) for p in run.phases
        ]
        assert made.model == "large" and made.precision == "bfloat16"
        built = build_schedule(made)
        expected = published_schedule(run)
        for step in np.linspace(0, run.total_steps - 1, 57).astype(int):
            assert float(built(int(step))) == pytest.approx(expected(int(step)), rel=1e-5, abs=1e-9)
        assert made.beta_2 == dict(run.optimizer)["beta_2"]
    assert len(recipes.RECIPES) == 2 + len(published.RECIPES) - 1


def published_schedule(run):
    """The rate in plain Python, from the words of the publications."""

    def rate(step):
        start = 0
        for number, part in enumerate(run.schedules):
            last = number == len(run.schedules) - 1
            if step < start + part.total_steps or last:
                s = step - start - part.first_step
                if s < part.warmup_steps:
                    return part.learning_rate * s / part.warmup_steps
                span = part.total_steps - part.first_step - part.warmup_steps
                return part.learning_rate * (1 - (s - part.warmup_steps) / span) ** part.power
            start += part.total_steps
        raise AssertionError

    return rate


def test_recipes_without_their_data_or_checkpoint_give_a_plan_only():
    with pytest.raises(InputError, match="--input_files: expected for --recipe=bert_large_32k"):
        config("--recipe=bert_large_32k")
    files = ["--input_files=a", "--eval_files=b", "--vocab_file=c"]
    with pytest.raises(InputError, match="--init_checkpoint: expected for --recipe=mlperf_8k"):
        config("--recipe=mlperf_8k", *files)
    assert config("--recipe=mlperf_8k", "--dry_run").warmup_first_step == (-76,)


def test_the_phase_follows_from_the_step():
    two = config("--recipe=demo_two_phase", "--num_train_steps=30,6", "--warmup_steps=4,2").phases
    assert [phases.phase_of(two, s).number for s in (0, 29, 30, 35, 36)] == [1, 1, 2, 2, 2]
    assert [phases.phase_that_led_to(two, s).number for s in (0, 30, 31, 36)] == [1, 1, 2, 2]
    assert two[0].data_seed(7) == 7 and two[1].data_seed(7) != 7


@pytest.mark.parametrize(
    ("size", "replicas", "fitting", "expected"),
    [(32768, 16, 64, 32), (32, 2, 100, 1), (48, 1, 20, 3), (7, 1, 3, 7), (65536, 2048, 32, 1)],
)
def test_accumulation_is_as_little_as_fits(size, replicas, fitting, expected):
    phase = dataclasses.replace(config().phases[0], train_batch_size=size)
    plan = batch_plan.plan_training(phase, replicas, fitting)
    assert plan.accumulation_steps == expected
    assert plan.per_replica_batch_size * replicas * plan.accumulation_steps == size
    assert plan.per_replica_batch_size <= fitting


def test_the_dry_run_of_a_recipe_prints_phases_curve_and_disk(tmp_path, capsys):
    flags = ["--recipe=bert_large_64k_32k", "--dry_run", f"--output_dir={tmp_path}/none"]
    assert train(*flags) == 0
    printed = capsys.readouterr().out
    for words in (
        "To run it: --input_files --eval_files --vocab_file; figures of size are for 30,522 tokens",
        "read in the source named: You et al.",
        "Data: 461,176,832 rows",
        "Phase 1 of 2: updates 1 to 7037, 128 tokens",
        "Phase 2 of 2: updates 7038 to 8599, 512 tokens",
        "Batch: 65536 = ",
        "Batch: 32768 = ",
        "warm-up to 0.007071 in 2814 updates",
        "F1: 90.584, in 76.19 minutes on 1024 TPUv3 chips",
        "8599 updates",
    ):
        assert words in printed, printed
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def two_phase_flags(small_records, tmp_path_factory):
    """Records of two lengths, found by the length of the phase."""
    folder = tmp_path_factory.mktemp("two")
    from tests import conftest

    for length, predictions in ((LENGTH, PREDICTIONS), (48, 8)):
        (folder / str(length)).mkdir()
        for name, seed in (("train", 1), ("eval", 2)):
            settings = conftest.examples.ExampleSettings(
                max_seq_length=length, max_predictions_per_seq=predictions, dupe_factor=1
            )
            documents = conftest.made_up_documents(40, seed)
            made = conftest.examples.build_examples(documents, small_records.words, settings, seed)
            path = f"{folder}/{length}/{name}.tfrecord"
            with conftest.tf.io.TFRecordWriter(path) as writer:
                for example in made:
                    writer.write(conftest.examples.serialize(example))
    return [
        f"--input_files={folder}/{{max_seq_length}}/train.tfrecord",
        f"--eval_files={folder}/{{max_seq_length}}/eval.tfrecord",
        f"--max_seq_length={LENGTH},48",
        f"--max_predictions_per_seq={PREDICTIONS},8",
        "--train_batch_size=8,4",
        "--num_train_steps=8,6",
        "--warmup_steps=2",
        "--learning_rate=0.01,0.005",
        "--steps_per_loop=2",
        "--save_every_steps=5",
    ]


def test_two_phases_train_in_one_run_and_go_on_from_anywhere(
    small_records, two_phase_flags, tmp_path, capsys
):
    whole = tmp_path / "whole"
    flags = short(small_records, whole) + two_phase_flags
    assert train(*flags, "--keep_checkpoints=9") == 0
    printed = capsys.readouterr().out
    assert "Phase 2: 48 tokens, batch 4 = 4 rows" in printed
    assert "Held out of 32 tokens after 8 updates" in printed
    assert "Held out of 48 tokens after 14 updates" in printed
    lines = metrics_of(whole)
    assert [(line["step"], line["phase"]) for line in lines] == [
        *((s, 1) for s in (2, 4, 5, 6, 8)),
        *((s, 2) for s in (10, 12, 14)),
    ]
    # The update numbered s used the rate of s - 1 updates; phase 2 warms up from zero again.
    rates = {line["step"]: line["learning_rate"] for line in lines}
    assert rates[4] == pytest.approx(0.01 * 5 / 6) and rates[10] == pytest.approx(0.005 / 2)
    kept = {p.stem for p in (whole / "checkpoints").glob("*.index")}
    assert kept == {"ckpt-5", "ckpt-8", "ckpt-10", "ckpt-14"}
    evaluations = [
        json.loads(line) for line in (whole / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [(e["step"], e["phase"]) for e in evaluations] == [(6, 1), (8, 1), (12, 2), (14, 2)]
    final, last = weights_of(whole), metrics_of(whole)
    # As kills within phase 1, at the boundary and within phase 2 would leave it.
    for newest in (5, 8, 10):
        for path in (whole / "checkpoints").glob("ckpt-*"):
            if int(path.name.split("-")[1].split(".")[0]) > newest:
                path.unlink()
        (whole / "summary.json").unlink()
        assert train(*flags, "--keep_checkpoints=9") == 0
        for name, value in weights_of(whole).items():
            np.testing.assert_array_equal(value, final[name], err_msg=f"{newest} {name}")
        again = metrics_of(whole)
        assert [a["step"] for a in again] == [b["step"] for b in last]
        assert [a["loss"] for a in again] == [b["loss"] for b in last]
        assert len((whole / "evaluations.jsonl").read_text().splitlines()) == 4
    # On two replicas the same batches, sums in another order.
    for path in (whole / "checkpoints").glob("ckpt-1*"):
        path.unlink()
    (whole / "summary.json").unlink()
    assert train(*flags, "--virtual_devices=2") == 0
    for name, value in weights_of(whole).items():
        np.testing.assert_allclose(value, final[name], atol=1e-6, err_msg=name)
    for a, b in zip(metrics_of(whole), last, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    before = everything_under(whole)
    capsys.readouterr()
    assert train(*flags, "--train_batch_size=8,8") == 2
    assert_one_line(capsys.readouterr().err, ["--train_batch_size was [8, 4], is [8, 8]"])
    assert everything_under(whole) == before
    assert train(*flags, "--mode=eval", f"--eval_checkpoint={whole}/checkpoints/ckpt-8") == 0
    printed = capsys.readouterr().out
    assert f"mlm_loss: {evaluations[1]['mlm_loss']:.6f}" in printed


def test_a_run_starts_from_the_weights_of_another_one(small_records, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(*short(small_records, first, 6)) == 0
    source = f"{first}/checkpoints/ckpt-6"
    flags = short(small_records, second, 6, learning_rate=1e-9, weight_decay=0.0)
    assert train(*flags, f"--init_checkpoint={source}") == 0
    assert f"Starting from the weights of {source}" in capsys.readouterr().out
    started, ended = weights_of(first), weights_of(second)
    for name, value in ended.items():
        np.testing.assert_allclose(value, started[name], atol=1e-6, err_msg=name)
    assert metrics_of(second)[0]["step"] == 3, "steps and moments are new"
    capsys.readouterr()
    assert train(*flags) == 2, "without those weights it is another run"
    assert_one_line(capsys.readouterr().err, [f"--init_checkpoint was {source}, is "])
