"""The plan of a run on a slice: its arithmetic by hand, and its constant against published runs."""

import importlib.util
import json
import math

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import published_runs
from lamb_tf.keras2 import LAMB
from pretraining import pod_plan, pod_plan_output, record_format, run_plan
from pretraining.config import Config
from pretraining.errors import InputError
from pretraining.model import MODELS
from pretraining.optimization import build_optimizer
from tpu import plan
from tpu.chips import parse_slice
from tpu.plan import StepWork

needs_compiler = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jax", "libtpu")),
    reason="the extra `preflight` is not installed",
)
V3_POD = parse_slice("v3-2048")
WORK = StepWork(flops=1e12, update_bytes=9e9, all_reduce_bytes=1e9)
RUN = {
    "input_files": "gs://b/{max_seq_length}",
    "eval_files": "gs://b/{max_seq_length}",
    "vocab_file": "gs://b/vocab.txt",
}


def plan_of(slice_name, vocab_size=30522, measured=None, price=None, **flags):
    config = Config.of_flags(**{"recipe": "bert_large_64k_32k", **RUN, **flags})
    return pod_plan.plan_pod(
        config,
        MODELS["large"],
        vocab_size,
        parse_slice(slice_name),
        measured=measured,
        price_per_chip_hour=price,
    )


def test_bound_of_a_step_by_hand():
    bound = plan.step_bound(WORK, V3_POD)
    # Two devices share a chip of 123 TFLOP/s and 900 GB/s; the pod all-reduces at 340 TB/s.
    assert bound.compute == pytest.approx(2 * 1e12 / 123e12)
    assert bound.update == pytest.approx(2 * 9e9 / 900e9)
    assert bound.all_reduce == pytest.approx(2 * 1023 / 1024 * 1e9 / (340e12 / 1024))
    assert bound.total == pytest.approx(bound.compute + bound.update + bound.all_reduce)


def test_only_matrix_products_are_slower_than_their_bound():
    bound, expected = plan.step_bound(WORK, V3_POD), plan.step_time(WORK, V3_POD)
    assert expected.compute == pytest.approx(bound.compute / plan.MATMUL_EFFICIENCY)
    assert (expected.update, expected.all_reduce) == (bound.update, bound.all_reduce)
    with pytest.raises(ValueError, match=r"efficiency must be in \(0, 1\]. Received: efficiency=0"):
        plan.step_time(WORK, V3_POD, efficiency=0)


def test_one_chip_sends_nothing():
    assert plan.step_time(WORK, parse_slice("v5e-1")).all_reduce == 0


def test_cost():
    paid = plan.cost(7200, V3_POD, 2.5)
    assert (paid.hours, paid.chip_hours, paid.money) == (2, 2048, 5120)
    twice = paid + paid
    assert (twice.hours, twice.chip_hours, twice.money) == (4, 4096, 10240)
    assert plan.cost(7200, V3_POD).money is None
    assert (paid + plan.cost(7200, V3_POD)).money is None


def test_input_rate_of_a_host():
    rate = plan.input_rate(32768, 0.5, V3_POD, record_bytes=1000, row_bytes=2000)
    assert rate.examples == 32768 / 256 / 0.5  # 256 hosts
    assert (rate.read_bytes, rate.device_bytes) == (256e3, 512e3)


def test_the_constant_is_what_half_of_the_published_runs_give():
    """The fit once more, over a grid and from the runs' times alone."""
    runs = published_runs.published_runs()
    assert len(runs) == 10
    half = published_runs.fitted_rows(runs)
    assert len(half) == 5
    grid = np.linspace(0.05, 0.95, 901)
    losses = []
    for efficiency in grid:
        times = [published_runs.predicted_minutes(run, efficiency) for run in half]
        losses.append(sum(math.log(t / r.minutes) ** 2 for t, r in zip(times, half, strict=True)))
    assert abs(plan.MATMUL_EFFICIENCY - grid[np.argmin(losses)]) <= 0.001


def test_published_runs_are_the_papers_and_mlperfs():
    runs = {run.name: run for run in published_runs.published_runs()}
    mixed = runs["BERT-Large, batch 65536, then 32768, LAMB"]
    assert (mixed.minutes, mixed.where.name) == (76.19, "v3-2048")
    adam = runs["BERT-Large, batch 512, Adam"]
    assert (adam.minutes, adam.where.num_chips) == (81.4 * 60, 16)
    mlperf = runs["BERT-Large, batch 448, length 512, MLPerf v0.7, TF2"]
    rate = 448 * 1117 / (60 * mlperf.minutes) / mlperf.where.num_chips
    assert rate == pytest.approx(60.8, abs=0.05)  # sequences a second and chip
    for row in published_runs.error_table():
        assert row["bound_minutes"] < row["published_minutes"]
        error = 100 * (row["predicted_minutes"] / row["published_minutes"] - 1)
        assert row["error_percent"] == pytest.approx(error, abs=0.2)  # of rounded minutes


def test_work_of_bert_large_from_its_dimensions():
    made = plan_of("v3-2048")
    first, second = made.phases
    assert (first.batch.rows_per_replica, second.batch.rows_per_replica) == (32, 16)
    assert not first.measured
    # GFLOP of a sequence: docs of `model_flops`.
    assert first.work.flops == pytest.approx(32 * 240.6e9, rel=1e-3)
    assert second.work.flops == pytest.approx(16 * 1019.8e9, rel=1e-3)
    assert made.parameters == 336_226_108
    assert first.work.update_bytes == 40 * made.parameters
    assert first.work.all_reduce_bytes == 4 * made.parameters
    assert made.checkpoint_bytes == 12 * made.parameters


def test_whole_run_adds_up():
    made = plan_of("v3-2048", price=2.0)
    seconds = sum(p.phase.num_train_steps * p.expected.total for p in made.phases)
    saving = made.checkpoints * made.checkpoint_bytes / plan.STORAGE_BANDWIDTH
    assert made.cost.hours == pytest.approx((seconds + saving) / 3600)
    assert made.cost.chip_hours == pytest.approx(1024 * made.cost.hours)
    assert made.cost.money == pytest.approx(2.0 * made.cost.chip_hours)
    assert made.least_cost.hours < made.cost.hours


def test_what_the_compiler_says_replaces_the_dimensions():
    made = plan_of("v3-2048", measured={2: WORK})
    assert [p.measured for p in made.phases] == [False, True]
    assert made.phases[1].work == WORK
    assert made.phases[1].bound == plan.step_bound(WORK, V3_POD)


@pytest.mark.parametrize(("interval", "steps"), [(0, (5, 6)), (4, (5, 6)), (5, (5, 6)), (3, (9,))])
def test_checkpoints_are_counted_as_the_loop_writes_them(interval, steps):
    config = Config.of_flags(
        num_train_steps=steps, save_every_steps=interval, max_seq_length=(64,) * len(steps)
    )
    ends = {phase.end_step for phase in config.phases}
    written = ends | set(range(interval, sum(steps) + 1, interval)) if interval else ends
    assert run_plan.saved_steps(config) == written


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"--train_batch_size=1000.*multiple of 2048 replicas"):
        plan_of("v3-2048", train_batch_size=1000)


@pytest.mark.parametrize(("length", "predictions"), [(128, 20), (512, 76)])
def test_size_of_a_record(length, predictions):
    """Against a record as google-research/bert writes it, with ids spread over its vocabulary."""
    made = plan_of("v3-2048", max_seq_length=length, max_predictions_per_seq=predictions)
    rng = np.random.default_rng(0)
    spec = record_format.RecordFormat(
        max_seq_length=length,
        max_predictions_per_seq=predictions,
        vocab_size=30522,
        type_vocab_size=2,
    )
    feature = {}
    for name, (key, *_) in record_format.RECORD_KEYS.items():
        if name.endswith("weights"):
            value = tf.train.Feature(float_list=tf.train.FloatList(value=[1.0] * predictions))
        else:
            ids = rng.integers(0, spec.limit(name), spec.length(name))
            if name in ("input_word_ids", "masked_lm_ids"):
                ids = np.minimum(ids, rng.zipf(1.2, len(ids)) + 1000)  # frequent words come first
            value = tf.train.Feature(int64_list=tf.train.Int64List(value=ids))
        feature[key] = value
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    rate = made.phases[0].input
    assert rate.read_bytes / rate.examples == pytest.approx(example.ByteSize() + 16, rel=0.1)
    assert rate.device_bytes / rate.examples == 4 * (3 * length + 3 * predictions + 1)


def test_plan_is_said_and_written(capsys):
    made = plan_of("v3-2048", price=2.0)
    pod_plan_output.say(made)
    said = capsys.readouterr().out
    for fact in ("1024 v3 chips", "2048 devices of 16 GiB, 256 hosts", "at the bound", "MB/s read"):
        assert fact in said
    written = json.loads(json.dumps(pod_plan_output.as_json(made)))
    assert (written["slice"], written["hosts"]) == ("v3-2048", 256)
    assert written["expected"]["money"] == pytest.approx(made.cost.money)
    assert written["phases"][0]["seconds_bound"]["total"] == made.phases[0].bound.total
    pod_plan_output.say(plan_of("v5litepod-256", train_batch_size=32768))
    assert "money" not in capsys.readouterr().out


def compiled_update(optimizer, shape):
    """The program of one variable's update on a v3."""
    from tpu.compiler import compile_step

    variable = tf.Variable(tf.zeros(shape), name="kernel")
    optimizer.build([variable])
    return compile_step(
        lambda gradient: optimizer.apply_gradients([(gradient, variable)]),
        [tf.TensorSpec(shape, tf.float32)],
        parse_slice("v3-8"),
    )


@needs_compiler
@pytest.mark.parametrize("optimizer", ["lamb", "lars", "momentum"])
def test_bytes_of_an_update_are_the_compilers(optimizer):
    built = build_optimizer(Config.of_flags(optimizer=optimizer))
    program = compiled_update(built, [2048, 1024])
    # Every scalar counts as a kilobyte, which is the 0.12.
    expected = pytest.approx(pod_plan.UPDATE_BYTES[optimizer], abs=0.12)
    assert program.bytes_accessed / 2**21 == expected


@needs_compiler
def test_bfloat16_moments_save_their_traffic_on_a_tpu():
    optimizer = LAMB(1e-3, weight_decay=0.01, moment_dtype="bfloat16")
    # Three axes: the noise of the rounding must not be reshaped.
    program = compiled_update(optimizer, [1024, 16, 64])
    # Reads g, m, v, p, writes m, v; then reads m, v, p, writes p. Scalars are what is left.
    assert program.bytes_accessed / 2**20 == pytest.approx(28, abs=0.5)
    assert program.memory.aliases / 2**20 == pytest.approx(8, abs=0.1)  # in place
