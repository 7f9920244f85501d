"""`--preflight`: the run's own steps compiled for slices that are not here."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from pretraining import (
    batch_search,
    bert_forward,
    compiled_step,
    input_pipeline,
    model_flops,
    preflight,
)
from pretraining.batch_plan import BatchPlan
from pretraining.batch_search import Trial, largest_that_fits
from pretraining.config import Config
from pretraining.errors import InputError
from pretraining.model import read_bert_config
from pretraining.run import main
from pretraining.run_plan import PhasePlan
from tests.test_input_pipeline import checked
from tests.test_records import FORMAT
from tpu.chips import parse_slice
from tpu.compiler import CompileError, OutOfMemoryError


@pytest.fixture(autouse=True)
def policy():
    before = tf_keras.mixed_precision.global_policy()
    yield
    tf_keras.mixed_precision.set_global_policy(before)


def flags_of(small_records, out):
    return [
        "pretraining.run",
        f"--bert_config_file={small_records.folder}/bert_config.json",
        "--max_seq_length=32",
        "--max_predictions_per_seq=5",
        f"--output_dir={out}",
    ]


@pytest.mark.parametrize(
    ("name", "flags", "micro_batches"),
    [
        ("v3-8", ["--precision=bfloat16", "--train_batch_size=128", "--accumulation_steps=4"], 4),
        ("v5litepod-4", ["--optimizer=adamw", "--train_batch_size=64"], 1),
    ],
)
def test_a_small_model_compiles(name, flags, micro_batches, small_records, tmp_path, capsys):
    out = tmp_path / "out"
    status = main([*flags_of(small_records, out), f"--preflight={name}", *flags])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    found = json.loads((out / f"preflight-{name}.json").read_text())
    (phase,), where = found["phases"], parse_slice(name)
    assert phase["compiles"] and phase["batch"]["accumulation_steps"] == micro_batches
    assert phase["batch"]["num_replicas"] == where.num_devices
    # Three float32 values a parameter; statistics and counters are a few bytes more.
    bert = read_bert_config(f"{small_records.folder}/bert_config.json")
    parameters = model_flops.parameter_count(bert, 65)
    assert 12 * parameters <= phase["variables_bytes"] <= 12 * parameters + 1000
    assert phase["variables_in_place_bytes"] >= phase["variables_bytes"]
    assert phase["flops"]["ratio"] == pytest.approx(1.0, abs=0.05)
    assert phase["memory_bytes"]["total"] < phase["memory_bytes"]["of_a_device"] == 16 * 2**30
    sums = phase["all_reduces"]
    assert {each["devices"] for each in sums} == {where.num_devices}
    assert {each["times"] for each in sums} == {1.0}
    # The gradients, the eight sums and the two counts.
    assert sum(each["bytes"] for each in sums) == pytest.approx(4 * parameters, abs=100)
    assert found["plan"]["phases"][0]["work"]["source"] == "compiler"
    assert f"preflight-{name}.json" in printed.out and printed.err == ""
    assert [path.name for path in out.iterdir()] == [f"preflight-{name}.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preflight=v3-7"], ["--preflight", "v3-7", "2048"]),
        (["--preflight=h100-8"], ["--preflight", "h100-8", "v3-2048"]),
        (["--preflight_search"], ["--preflight_search", "expected --preflight"]),
        (["--price_per_chip_hour=2"], ["--price_per_chip_hour", "expected --preflight"]),
        (["--preflight=v3-8", "--price_per_chip_hour=-2"], ["--price_per_chip_hour=-2", "at least"]),
        (["--preflight=v3-8", "--mode=eval"], ["--mode=eval", "--preflight"]),
        (["--preflight=v3-8", "--train_batch_size=12"], ["--train_batch_size=12", "8 replicas"]),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_refused(flags, words, small_records, tmp_path, capsys):
    assert main([*flags_of(small_records, tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_missing_compiler_is_said_in_a_line(small_records, tmp_path, capsys, monkeypatch):
    def missing(where):
        raise CompileError("the TPU compiler is not installed. Install it: pip install")

    monkeypatch.setattr(preflight, "topology_devices", missing)
    assert main([*flags_of(small_records, tmp_path / "out"), "--preflight=v3-8"]) == 2
    assert "Install it: pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_operation_that_tpus_lack_is_refused(small_records, tmp_path, capsys, monkeypatch):
    plain = bert_forward.forward

    def forward(model, batch, key):
        return plain(model, batch, key)[0], tf.py_function(lambda: 0.0, [], tf.float32)

    monkeypatch.setattr(bert_forward, "forward", forward)
    monkeypatch.setattr(
        "pretraining.train_step._sums_of",
        lambda task, logits, labels, weights: dict.fromkeys(
            (f"{task}_loss", f"{task}_correct", f"{task}_count"), tf.reduce_sum(logits)
        ),
    )
    assert main([*flags_of(small_records, tmp_path / "out"), "--preflight=v5litepod-1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "EagerPyFunc" in error and "test_preflight.py" in error
    found = json.loads((tmp_path / "out/preflight-v5litepod-1.json").read_text())
    assert not found["phases"][0]["compiles"] and "EagerPyFunc" in found["phases"][0]["reason"]


class FakeCompiler:
    """Fits where rows x 10 bytes and 1000 fixed ones, more with a loop, are at most `limit`."""

    state_bytes = 1000

    def __init__(self, limit):
        self.limit, self.tried = limit, []

    def compile(self, phase, rows, accumulation_steps):
        self.tried.append((rows, accumulation_steps))
        total = 1000 + 10 * rows + (500 if accumulation_steps > 1 else 0)
        if total > self.limit:
            raise OutOfMemoryError(f"it does not fit: {total} bytes", total, self.limit)
        memory = dataclasses.make_dataclass("Memory", ["total"])(total)
        program = dataclasses.make_dataclass("Program", ["memory"])(memory)
        report = dataclasses.make_dataclass("Report", ["program"])(program)
        report.as_json, report.lines = dict, list
        return report

    def seconds(self, phase, rows, accumulation_steps):
        return 0.0


def checker(limit, rows, accumulation_steps, search):
    where = dataclasses.replace(parse_slice("v3-8"), chip=parse_slice("v3-8").chip)
    batch = BatchPlan(
        global_batch_size=8 * rows, num_replicas=8, accumulation_steps=accumulation_steps
    )
    plan = PhasePlan(phase=Config().phases[0], train=batch, held_out=batch)
    fake = FakeCompiler(limit)
    return preflight._PhaseChecker(fake, plan, where, search), fake


def test_what_does_not_fit_is_refused_with_the_largest_that_does(capsys):
    # 240 rows in two halves: 1500 + 10 x 120 bytes is more than 2600; 1500 + 10 x 80 is not.
    found, _ = checker(2600, 240, 2, search=False)
    with pytest.raises(InputError) as raised:
        found.check()
    text = str(raised.value)
    assert "phase 1: 120 rows a device: it does not fit: 2700 bytes" in text
    assert "that divide the 240 of a device is 80: --accumulation_steps=3" in text
    assert found.findings["largest_rows_that_fit"] == 80 and found.findings["compiles"] is False
    assert capsys.readouterr().out.count("120 rows a device") == 1


def test_the_search_takes_the_fewest_micro_batches(capsys):
    found, fake = checker(2600, 240, 240, search=True)
    found.check()
    assert found.batch.accumulation_steps == 3 and found.batch.per_replica_batch_size == 80
    assert found.findings["largest_rows_that_fit"] == 80 and found.findings["compiles"]
    assert (80, 3) in fake.tried and (120, 2) in fake.tried
    # All rows at once fit, without the memory of a sum, where two halves do not.
    found, _ = checker(2100, 110, 10, search=True)
    found.check()
    assert found.batch.accumulation_steps == 1
    assert found.findings["largest_rows_that_fit"] == 110


def test_not_even_one_row_fits():
    for search in (False, True):
        found, _ = checker(1005, 8, 1, search)
        with pytest.raises(InputError, match=r"[Nn]ot even one row"):
            found.check()


@pytest.mark.parametrize("saved", [0.0, 0.5])
def test_the_search_finds_the_largest_in_a_few_trials(saved):
    """Also where the compiler saves up to half of what goes beyond the limit, by computing it again."""
    rng = np.random.default_rng(3)
    for _ in range(300):
        fixed, per_row = int(rng.integers(0, 10**6)), int(rng.integers(1, 10**5))
        bend = float(rng.uniform(0.6, 1.2))  # memory that is not quite a line
        limit = fixed + int(rng.integers(0, 10**8))
        sizes = batch_search.sizes_of(int(rng.integers(1, 20)) * 2 ** int(rng.integers(0, 12)))
        tried = []

        def size(rows, fixed=fixed, per_row=per_row, bend=bend, limit=limit):
            whole = fixed + int(per_row * rows**bend)
            return max(min(limit, whole), whole - int(saved * (whole - fixed)))

        def attempt(rows, size=size, limit=limit, tried=tried):
            tried.append(rows)
            return Trial(size(rows) <= limit, size(rows))

        found = largest_that_fits(attempt, sizes, int(rng.choice(sizes)), limit, fixed)
        assert found == max((rows for rows in sizes if size(rows) <= limit), default=0)
        assert len(tried) == len(set(tried)) and len(tried) <= 7


def test_sizes_divide_the_rows():
    assert batch_search.sizes_of(12) == [1, 2, 3, 4, 6, 12]
    assert batch_search.sizes_of(509) == [1, 509]


def test_a_dry_run_plans_without_compiling(small_records, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "StepCompiler", None)
    flags = ["--preflight=v3-32", "--dry_run", "--price_per_chip_hour=2", "--num_train_steps=1000"]
    assert main([*flags_of(small_records, tmp_path / "out"), *flags]) == 0
    assert "Plan for v3-32: 16 v3 chips" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_without_records_will_do(small_records, tmp_path, capsys):
    flags = ["--preflight=v3-8", "--dry_run", f"--vocab_file={small_records.folder}/vocab.txt"]
    assert main([*flags_of(small_records, tmp_path / "out"), *flags]) == 0
    assert main(["pretraining.run", "--preflight=v3-8", "--vocab_file=/no"]) == 2
    assert "--vocab_file=/no" in capsys.readouterr().err


def test_a_batch_is_what_the_input_pipeline_delivers(small_records):
    records = checked([f"{small_records.folder}/train-0.tfrecord"])
    plan = BatchPlan(global_batch_size=4, num_replicas=1)
    dataset = input_pipeline.train_dataset(records, FORMAT, plan, 1, 0)
    phase = Config(max_seq_length=32, max_predictions_per_seq=5).phases[0]
    assert compiled_step.batch_shapes(phase, 4) == dataset.element_spec
