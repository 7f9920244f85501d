"""`python -m pretraining.run` as its users start it."""

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

from pretraining import run
from pretraining.config import Config
from tests.conftest import LENGTH, made_up_documents, write_records
from tests.test_manifest import damaged_at, known_records  # noqa: F401
from tests.test_records import rewritten, set_value

ROOT = pathlib.Path(__file__).parents[1]
METRICS = {
    "step",
    "loss",
    "mlm_loss",
    "nsp_loss",
    "mlm_accuracy",
    "nsp_accuracy",
    "learning_rate",
    "grad_norm",
    "examples_per_sec",
    "tokens_per_sec",
    "model_flops_utilization",
    "skipped_steps",
    "phase",
}


def train(*flags):
    return run.main(["run", *map(str, flags)])


def program(*flags, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "pretraining.run", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **options,
    )


def metrics_of(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(output_dir):
    path = tf.train.latest_checkpoint(str(output_dir / "checkpoints"))
    reader = tf.train.load_checkpoint(path)
    names = [n for n in reader.get_variable_to_shape_map() if "VARIABLE_VALUE" in n]
    return {name: reader.get_tensor(name) for name in names if "model" in name}


def short(records, output_dir, steps=12, **flags):
    values = {
        "num_train_steps": steps,
        "warmup_steps": 3,
        "steps_per_loop": 3,
        "save_every_steps": 6,
        "eval_every_steps": 6,
        "jit_compile": False,  # compiling takes longer than these runs
        "log_layers_every_steps": 0,  # so does drawing the layers
        **flags,
    }
    return [
        *records.flags,
        f"--output_dir={output_dir}",
        *(f"--{k}={v}" for k, v in values.items()),
    ]


def test_a_run_leaves_what_it_promises(small_records, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(*short(small_records, out, log_layers_every_steps=12)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Output: {out}\n")
    assert "Always guessing the most frequent token" in printed

    lines = metrics_of(out)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert all(set(line) == METRICS for line in lines)
    # The update numbered s used the learning rate of s - 1 updates: 3 of warm-up, then 9 of decay.
    expected = [0.01 * 2 / 3, 0.01 * 7 / 9, 0.01 * 4 / 9, 0.01 * 1 / 9]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], expected, rtol=1e-5)

    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["num_train_steps"] == 12
    assert config["batch_plan"]["global_batch_size"] == 8

    summary = json.loads((out / "summary.json").read_text())
    assert summary["step"] == 12
    assert summary["checkpoint"] == tf.train.latest_checkpoint(str(out / "checkpoints"))
    assert summary["train"] == {k: v for k, v in lines[-1].items() if k != "step"}
    assert {"mlm_loss", "mlm_accuracy", "nsp_accuracy"} <= set(summary["eval"])
    baseline = summary["eval"]["most_frequent_token_accuracy"]
    labels = labels_of(small_records.folder / "eval.tfrecord")
    token = small_records.words.ids[summary["eval"]["most_frequent_token"]]
    assert baseline == pytest.approx(labels.count(token) / len(labels))
    names = json.loads((out / "layers.jsonl").read_text().splitlines()[0])["names"]
    curves = curves_of(out / "tensorboard/train")
    assert len(names) > 20 and {f"trust_ratio/{name}" for name in names} <= set(curves)
    assert curves["loss"] == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert curves[f"trust_ratio/{names[0]}"].keys() == {12}, "every 12 steps, as the flag says"
    assert set(curves_of(out / "tensorboard/eval")["mlm_accuracy"]) == {6, 12}
    page = (out / "report.html").read_text()
    assert "Trust ratio" in page and names[0] in page and "<script src" not in page
    assert summary["evaluated"]["eval_files"] and summary["evaluated"]["eval_steps"] == 0

    before = {p: p.read_bytes() for p in out.glob("*.json*")}
    assert train(*short(small_records, out)) == 0
    assert "This run is done: 12 updates." in capsys.readouterr().out
    assert {p: p.read_bytes() for p in out.glob("*.jsonl")} == {
        p: b for p, b in before.items() if p.suffix == ".jsonl"
    }

    assert train(*short(small_records, out), "--mode=eval") == 0
    printed = capsys.readouterr().out
    value = float(re.search(r"mlm_loss: ([\d.]+)", printed)[1])
    assert value == pytest.approx(summary["eval"]["mlm_loss"], abs=1e-5)


def curves_of(folder):
    """The points of each tag, by step."""
    curves = {}
    for path in folder.glob("events*"):
        for content in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(content)
            for value in event.summary.value:
                assert event.step not in curves.setdefault(value.tag, {}), "each step once"
                curves[value.tag][event.step] = float(tf.make_ndarray(value.tensor))
    return curves


def labels_of(path):
    labels = []
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        feature = tf.train.Example.FromString(record).features.feature
        count = int(sum(feature["masked_lm_weights"].float_list.value))
        labels += feature["masked_lm_ids"].int64_list.value[:count]
    return labels


def test_two_virtual_replicas_train_the_same_weights_as_one(small_records, tmp_path):
    for replicas in (0, 2):
        flags = short(small_records, tmp_path / str(replicas), virtual_devices=replicas)
        assert train(*flags) == 0
    one, two = (weights_of(tmp_path / name) for name in ("0", "2"))
    assert one.keys() == two.keys() and len(one) > 20
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=2e-6, err_msg=name)
    loss = [json.loads((tmp_path / n / "summary.json").read_text())["eval"] for n in "02"]
    assert loss[0]["mlm_loss"] == pytest.approx(loss[1]["mlm_loss"], rel=1e-5)


def test_a_short_run_warms_up_for_an_eighth_of_it():
    assert Config().warmup_steps == Config(num_train_steps=10**6).warmup_steps == (100,)
    assert Config(num_train_steps=40).warmup_steps == (5,)
    assert Config(num_train_steps=40, warmup_steps=0).warmup_steps == (0,)


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "adam", "momentum", "adagrad"])
def test_the_other_optimizers_train(small_records, tmp_path, optimizer):
    rates = {"momentum": 0.1, "adagrad": 0.03}
    flags = short(
        small_records,
        tmp_path / "o",
        steps=60,
        optimizer=optimizer,
        learning_rate=rates.get(optimizer, 0.01),
        eval_every_steps=0,
    )
    assert train(*flags) == 0
    losses = [line["mlm_loss"] for line in metrics_of(tmp_path / "o")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.03, losses


def test_bfloat16_trains_float32_weights(small_records, tmp_path):
    assert train(*short(small_records, tmp_path / "b", precision="bfloat16")) == 0
    assert {v.dtype for v in weights_of(tmp_path / "b").values()} == {np.dtype("float32")}
    assert train(*short(small_records, tmp_path / "f")) == 0
    b, f = ([m["loss"] for m in metrics_of(tmp_path / n)] for n in "bf")
    assert b != f
    np.testing.assert_allclose(b, f, rtol=0.02)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(small_records, tmp_path):
    """SIGTERM and SIGINT: saved, exit 75, no traceback; the end is that of an unbroken run."""
    steps, out = 4000, tmp_path / "stopped"
    flags = short(small_records, out, steps, save_every_steps=0, eval_every_steps=0)
    reached = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = program(*flags)
        wait_for_metrics(process, out, reached + 30)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 75, printed
        assert "Traceback" not in printed
        stopped = re.search(rf"{number.name}: stopped after (\d+) of 4000 updates", printed)
        assert stopped and int(stopped[1]) > reached, printed
        reached = int(stopped[1])
        assert tf.train.latest_checkpoint(str(out / "checkpoints")).endswith(f"-{reached}")
    end = reached + 6
    # Another number of steps would be another run; so end both of them by evaluating a prefix.
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    whole = tmp_path / "whole"
    process = program(*short(small_records, whole, steps, save_every_steps=0, eval_every_steps=0))
    wait_for_metrics(process, whole, end)
    process.kill()
    process.communicate()
    other = {line["step"]: line["loss"] for line in metrics_of(whole)}
    for line in lines:
        if line["step"] in other:
            assert other[line["step"]] == pytest.approx(line["loss"], rel=1e-4)


def wait_for_metrics(process, out, step):
    path = out / "metrics.jsonl"
    for _ in range(1200):
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
        if path.exists() and any(
            json.loads(line)["step"] >= step
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ):
            return
    raise AssertionError(f"no step {step} within two minutes")


def test_after_a_kill_each_step_stands_once(small_records, tmp_path):
    out = tmp_path / "killed"
    flags = short(small_records, out, 12)
    assert train(*flags) == 0
    whole = metrics_of(out)
    final = weights_of(out)
    # As a kill after the checkpoint of step 6 would leave it.
    for path in (out / "checkpoints").glob("ckpt-12.*"):
        path.unlink()
    (out / "summary.json").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert train(*flags) == 0
    again = metrics_of(out)
    assert [line["step"] for line in again] == [3, 6, 9, 12]
    for a, b in zip(whole, again, strict=True):
        assert a["loss"] == b["loss"]
    for name, value in weights_of(out).items():
        np.testing.assert_array_equal(value, final[name], err_msg=name)


def test_records_of_tf_models_train_unchanged(small_records, tmp_path):
    """The records, written by tf-models' own script, go in as they are."""
    words = small_records.words
    for name, seed in (("train", 1), ("eval", 2)):
        text = "\n\n".join(
            "\n".join(" ".join(words.tokens[i] for i in s) for s in d)
            for d in made_up_documents(40, seed)
        )
        (tmp_path / f"{name}.txt").write_text(text + "\n")
        subprocess.run(
            [sys.executable, "-m", "official.nlp.data.create_pretraining_data"]
            + [f"--input_file={tmp_path}/{name}.txt", f"--output_file={tmp_path}/{name}.tfrecord"]
            + [f"--vocab_file={small_records.folder}/vocab.txt", "--dupe_factor=2"]
            + [f"--max_seq_length={LENGTH}", "--max_predictions_per_seq=5"],
            check=True,
            capture_output=True,
        )
    out = tmp_path / "run"
    flags = short(small_records, out, 30, learning_rate=0.02)
    flags += [f"--input_files={tmp_path}/train.tfrecord", f"--eval_files={tmp_path}/eval.tfrecord"]
    assert train(*flags) == 0
    losses = [line["mlm_loss"] for line in metrics_of(out)]
    assert losses[-1] < losses[0]


def everything_under(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in pathlib.Path(folder).rglob("*")}


BAD_FLAGS = {
    "no file": (["--input_files={records}/nothing-*"], ["--input_files", "nothing-*", "no file"]),
    "no eval file": (["--eval_files={records}/none"], ["--eval_files", "none"]),
    "no TFRecord": (["--input_files={records}/vocab.txt"], ["vocab.txt", "TFRecord"]),
    "other length": (["--max_seq_length=64"], ["--max_seq_length=64", "Received: 32", "record 0"]),
    "other predictions": (["--max_predictions_per_seq=7"], ["--max_predictions_per_seq=7"]),
    "small vocabulary": (["--vocab_file={tmp}/small.txt"], ["--vocab_file", "record", "input_ids"]),
    "no vocabulary": (["--vocab_file={tmp}/none.txt"], ["--vocab_file", "none.txt"]),
    "empty vocabulary": (["--vocab_file="], ["--vocab_file"]),
    "indivisible batch": (
        ["--train_batch_size=9", "--virtual_devices=2"],
        ["--train_batch_size=9", "multiple of 2 replicas"],
    ),
    "indivisible accumulation": (
        ["--train_batch_size=8", "--accumulation_steps=3"],
        ["--train_batch_size=8", "3 accumulation steps"],
    ),
    "indivisible evaluation": (
        ["--eval_batch_size=3", "--virtual_devices=2"],
        ["--eval_batch_size=3", "multiple of 2"],
    ),
    "negative rate": (["--learning_rate=-0.1"], ["--learning_rate=-0.1", "more than 0"]),
    "large seed": (["--seed=99999999999999999999"], ["--seed", "less than 4294967296"]),
    "a folder for a vocabulary": (["--vocab_file={records}"], ["--vocab_file", "folder"]),
    "too many updates": (["--num_train_steps=99999999999999999999"], ["at most 100000000"]),
    "too many replicas": (
        ["--virtual_devices=100000"],
        ["--virtual_devices=100000", "at most 256"],
    ),
    "no weights": (["--init_checkpoint={tmp}/none"], ["--init_checkpoint", "none", "ckpt-<step>"]),
    "no epsilon": (["--epsilon=0"], ["--epsilon=0", "more than 0"]),
    "infinite rate": (["--learning_rate=inf"], ["--learning_rate=inf", "finite"]),
    "no number": (["--learning_rate=fast"], ["--learning_rate=fast"]),
    "long warm-up": (["--warmup_steps=13"], ["--warmup_steps=13", "--num_train_steps=12"]),
    "optimizer": (["--optimizer=sgdx"], ["--optimizer=sgdx", "lamb, lars, adamw"]),
    "model": (["--model=huge"], ["--model=huge", "tiny, mini"]),
    "unknown flag": (["--lerning_rate=1"], ["lerning_rate"]),
    "stray word": (["now"], ["now"]),
    "proc": (["--output_dir=/proc/x"], ["--output_dir=/proc/x", "written"]),
    "a pattern for a folder": (["--output_dir={tmp}/r[1]"], ["--output_dir", "r[1]", "without"]),
    "a file for a folder": (["--output_dir={records}/vocab.txt"], ["--output_dir", "vocab.txt"]),
    "bert config": (["--bert_config_file={records}/vocab.txt"], ["--bert_config_file", "JSON"]),
    "long sequences": (["--max_seq_length=1024"], ["--max_seq_length=1024", "512 positions"]),
    "no TPU": (["--tpu=local"], ["--tpu=local", "Tried", "Check"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_input_gives_one_line_and_touches_nothing(small_records, tmp_path, capsys, case):
    flags, words = BAD_FLAGS[case]
    small = small_records.words.tokens[:40]
    (tmp_path / "small.txt").write_text("".join(f"{token}\n" for token in small))
    places = {"records": small_records.folder, "tmp": tmp_path}
    flags = [flag.format(**places) for flag in flags]
    before = everything_under(tmp_path) | everything_under(small_records.folder)
    assert train(*short(small_records, tmp_path / "out"), *flags) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert everything_under(tmp_path) | everything_under(small_records.folder) == before


def assert_one_line(stderr, words):
    # A progress bar may have been drawn while the records were read.
    lines = [line for line in stderr.splitlines() if line and not line.startswith("Checking ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_another_run_in_the_same_folder_is_refused(small_records, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(*short(small_records, out)) == 0
    write_records(tmp_path / "other.tfrecord", made_up_documents(30, 77), small_records.words)
    before = everything_under(out)
    for flags, words in (
        (
            ["--eval_files=", "--input_files=", "--vocab_file="],
            ["--input_files: expected --input_files="],
        ),
        (["--learning_rate=0.02", "--seed=9"], ["learning_rate was 0.01, is 0.02", "seed was 1"]),
        (["--optimizer=adamw"], ["--optimizer was lamb, is adamw"]),
        (["--num_train_steps=13"], ["--num_train_steps was 12, is 13"]),
        (["--train_batch_size=16"], ["--train_batch_size was 8, is 16"]),
        (["--precision=bfloat16"], ["--precision was float32"]),
        (["--bert_config_file=", "--model=tiny"], ["--model was"]),
        ([f"--input_files={tmp_path}/other.tfrecord"], ["--input_files held other records"]),
    ):
        capsys.readouterr()
        assert train(*short(small_records, out), *flags) == 2
        assert_one_line(capsys.readouterr().err, [str(out), *words])
        assert everything_under(out) == before
    # Where it runs and how often it saves are free to change.
    assert train(*short(small_records, out, virtual_devices=2, save_every_steps=3)) == 0


def test_two_runs_at_once_in_one_folder_are_refused(small_records, tmp_path, capsys):
    out = tmp_path / "run"
    flags = short(small_records, out, 100_000)
    first = program(*flags)
    wait_for_metrics(first, out, 3)
    assert train(*flags) == 2
    assert_one_line(capsys.readouterr().err, [f"--output_dir={out}", f"process {first.pid}"])
    first.kill()
    first.communicate()


def test_a_full_disk_stops_the_run_in_one_line_and_the_next_start_goes_on(small_records, tmp_path):
    """A limit on the size of a file plays the full disk: the first checkpoint is beyond it."""
    flags = short(small_records, tmp_path / "full")
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash"]  # 20 KiB
    command = [*limited, sys.executable, "-m", "pretraining.run", *flags]
    process = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    printed = process.stdout
    assert process.returncode == 2, printed
    assert "Traceback" not in printed
    assert re.search(r"(?m)^error: --output_dir: .*checkpoints cannot be written", printed), printed
    assert train(*flags) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "full")] == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[1]"),
        ("config.json", "{}"),
        ("config.json", "{"),
        ("summary.json", "[]"),
        ("checkpoints/*.index", ""),
        ("checkpoints/*.data-00000-of-00001", "short"),
    ],
)
def test_a_damaged_file_of_the_run_is_named_and_nothing_is_overwritten(
    small_records, tmp_path, capsys, name, content
):
    out = tmp_path / "run"
    assert train(*short(small_records, out)) == 0
    if "checkpoints" in name:
        (out / "summary.json").unlink()
    for path in out.glob(name):
        path.write_text(content)
    metrics, checkpoints = metrics_of(out), everything_under(out / "checkpoints")
    capsys.readouterr()
    assert train(*short(small_records, out)) == 2
    words = ["step 6, 12"] if "checkpoints" in name else [name]
    assert_one_line(capsys.readouterr().err, ["--output_dir", *words])
    assert metrics_of(out) == metrics
    assert everything_under(out / "checkpoints") == checkpoints


@pytest.mark.parametrize("damage", ["truncated", "flipped index", "no data"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    small_records, tmp_path, capsys, damage
):
    out = tmp_path / "run"
    assert train(*short(small_records, out)) == 0
    final = weights_of(out)
    (out / "summary.json").unlink()
    (data,), index = (out / "checkpoints").glob("ckpt-12.data*"), out / "checkpoints/ckpt-12.index"
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "flipped index":
        content = bytearray(index.read_bytes())
        content[len(content) // 2] ^= 1
        index.write_bytes(content)
    else:
        data.unlink()
    capsys.readouterr()
    assert train(*short(small_records, out)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"ckpt-12 is damaged .*Trying the one before", printed)
    assert f"Going on from {out}/checkpoints/ckpt-6" in printed
    assert [line["step"] for line in metrics_of(out)] == [3, 6, 9, 12]
    for name, value in weights_of(out).items():
        np.testing.assert_array_equal(value, final[name], err_msg=name)


def test_damaged_lines_of_metrics_are_dropped(small_records, tmp_path):
    out = tmp_path / "run"
    assert train(*short(small_records, out)) == 0
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(b'\xff\xfe\n{"step": "x"}\n[]\n' + whole)
    (out / "summary.json").unlink()
    assert train(*short(small_records, out)) == 0
    assert (out / "metrics.jsonl").read_bytes() == whole
    assert json.loads((out / "summary.json").read_text())["train"]["loss"] > 0


def test_other_held_out_records_are_evaluated_anew(small_records, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(*short(small_records, out)) == 0
    first = json.loads((out / "summary.json").read_text())["eval"]
    assert train(*short(small_records, out), f"--eval_files={small_records.folder}/train-1*") == 0
    second = json.loads((out / "summary.json").read_text())["eval"]
    assert second["mlm_loss"] != first["mlm_loss"]
    capsys.readouterr()
    assert train(*short(small_records, out), f"--eval_files={small_records.folder}/train-1*") == 0
    assert "This run is done" in capsys.readouterr().out


def test_names_with_commas_stars_and_brackets_are_found(small_records, tmp_path):
    folder = tmp_path / "a, b[1]*"
    shutil.copytree(small_records.folder, folder)
    odd = folder / "train-0.tfrecord"
    flags = short(small_records, tmp_path / "a, b", 4, warmup_steps=1)
    flags += [f"--input_files={odd}", f"--eval_files={odd}", f"--vocab_file={folder}/vocab.txt"]
    assert train(*flags) == 0
    assert train(*flags) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be above 0"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
        ({"hidden_size": "128"}, "hidden_size must be a int"),
        ({"hidden_act": "foo"}, "hidden_act must be one of gelu"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be above 0"),
        ({"hidden_dropout_prob": 3}, r"hidden_dropout_prob must be in [0, 1)"),
        ({"vocab_size": 64}, "expected a vocab_size of at least the 65 tokens"),
        ({"hidden_size": None}, "hidden_size must be"),
    ],
)
def test_a_bad_bert_config_is_named(small_records, tmp_path, capsys, changes, words):
    values = json.loads((small_records.folder / "bert_config.json").read_text())
    path = tmp_path / "bert.json"
    path.write_text(json.dumps({**values, **changes}))
    flags = [*short(small_records, tmp_path / "out"), f"--bert_config_file={path}"]
    assert train(*flags) == 2
    assert_one_line(capsys.readouterr().err, [f"--bert_config_file={path}", words])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_saved(small_records, tmp_path, capsys):
    """The loss of the only update is finite, the weights after it are not."""
    out = tmp_path / "run"
    flags = short(small_records, out, 1, warmup_steps=0, optimizer="adamw", learning_rate=1e38)
    assert train(*flags, "--weight_decay=1e10") == 2
    assert "--learning_rate" in capsys.readouterr().err
    assert not list((out / "checkpoints").glob("*"))
    assert not (out / "summary.json").exists()


def test_an_evaluation_that_is_not_finite_is_no_result(small_records, tmp_path, capsys):
    out = tmp_path / "run"
    flags = short(small_records, out, 1, warmup_steps=0, learning_rate=1e38)
    assert train(*flags) == 2
    assert "--learning_rate" in capsys.readouterr().err
    assert not (out / "summary.json").exists()


def test_a_folder_named_data_is_left_alone(tmp_path, capsys):
    thesis = tmp_path / "data" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    assert train(f"--output_dir={tmp_path}") == 2
    assert_one_line(capsys.readouterr().err, [f"{tmp_path}/data", "prepared.json"])
    assert thesis.read_text() == "mine"
    assert not (tmp_path / "config.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(small_records, tmp_path, capsys):
    out = tmp_path / "run"
    flags = short(
        small_records,
        out,
        30,
        optimizer="momentum",
        learning_rate=1e30,
        save_every_steps=1,
        eval_every_steps=0,
    )
    assert train(*flags, "--clip_global_norm=0", "--warmup_steps=0", "--steps_per_loop=1") == 2
    error = capsys.readouterr().err
    assert "updates in a row, from update" in error and "--learning_rate" in error, error
    newest = int(tf.train.latest_checkpoint(str(out / "checkpoints")).split("-")[-1])
    assert f"from update {newest + 1} on" in error, "nothing is saved within the row"
    for value in weights_of(out).values():
        assert np.isfinite(value).all()


def test_only_a_checkpoint_of_this_model_is_evaluated(small_records, tmp_path, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    assert train(*short(small_records, out), "--mode=train") == 0
    foreign = tf.train.Checkpoint(model=tf.Variable([1.0])).save(str(tmp_path / "foreign"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (out / "checkpoints").glob("ckpt-12.*"):
        content = path.read_bytes()
        (damaged / path.name).write_bytes(content if "index" in path.name else content[:500])
    cases = {
        foreign: ["--eval_checkpoint", foreign, "is that of another"],
        f"{damaged}/ckpt-12": ["--eval_checkpoint", "damaged/ckpt-12", "cannot be read"],
        f"{tmp_path}/none": ["--eval_checkpoint", "none there"],
        "": [f"--output_dir={other}", "expected a checkpoint"],
    }
    for path, words in cases.items():
        capsys.readouterr()
        flags = [*short(small_records, other), "--mode=eval", f"--eval_checkpoint={path}"]
        assert train(*flags) == 2
        assert_one_line(capsys.readouterr().err, words)
        assert not other.exists()
    good = tf.train.latest_checkpoint(str(out / "checkpoints"))
    flags = [*short(small_records, other), "--mode=eval", f"--eval_checkpoint={good}"]
    assert train(*flags) == 0
    assert "Held out after 12 updates" in capsys.readouterr().out
    assert not other.exists()


def test_a_dry_run_prints_the_plan_and_does_nothing(small_records, tmp_path, capsys):
    assert (
        train(*short(small_records, tmp_path / "out"), "--dry_run", "--accumulation_steps=2") == 0
    )
    assert "8 = 4 rows x 1 replica x 2 micro-batches" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    flags = [*short(small_records, tmp_path / "out"), "--dry_run", "--max_seq_length=64"]
    assert train(*flags) == 2
    assert_one_line(capsys.readouterr().err, ["--max_seq_length=64"])
    assert not (tmp_path / "out").exists()


def test_the_default_run_learns_from_text_that_it_finds(tmp_path):
    """No data flag at all, with few updates; once more, and the data is there."""
    out = tmp_path / "run"
    flags = [f"--output_dir={out}", "--num_train_steps=4", "--warmup_steps=1", "--steps_per_loop=2"]
    process = program(*flags)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    train_text, held_out = ((out / "data" / f"{n}.txt").read_text() for n in ("train", "eval"))
    assert len(train_text.encode()) + len(held_out.encode()) >= 3_000_000
    assert len(held_out.split("\n\n")) >= 20
    assert set(held_out.split("\n")).isdisjoint(set(train_text.split("\n")) - {""}) or (
        set(held_out.split("\n")) & set(train_text.split("\n")) == {""}
    )
    assert json.loads((out / "summary.json").read_text())["step"] == 4
    assert "left]" in printed and "steps/s" in printed
    process = program(*flags)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Data: " in printed
    assert "This run is done: 4 updates." in printed


def test_a_profile_of_some_updates_is_recorded(small_records, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(*short(small_records, out, 6, warmup_steps=1), "--profile_steps=2:4") == 0
    assert f"Profile of updates 3 and on: {out}/tensorboard/profile" in capsys.readouterr().out
    assert list((out / "tensorboard/profile").rglob("*.xplane.pb"))
    assert [line["step"] for line in metrics_of(out)] == [2, 4, 6]


def test_help_lists_every_flag_without_importing_tensorflow(capsys):
    with pytest.raises(SystemExit) as ended:
        train("--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--tpu", "--input_files", "--learning_rate", "--virtual_devices", "--output_dir"):
        assert flag in printed


def test_damage_stops_the_run_by_file_and_record_and_may_be_skipped(
    small_records,
    known_records,  # noqa: F811
    tmp_path,
    capsys,
):
    flags = [f for f in short(small_records, tmp_path / "x", 24) if "input_files" not in f]
    flags.append(f"--input_files={known_records}")
    damaged_at(known_records / "train-2.tfrecord", 13)
    assert train(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        f"error: --input_files={known_records}/train-2.tfrecord: record 13 is damaged"
    )
    assert "--skip_corrupt_records" in error
    assert train(*flags, "--skip_corrupt_records") == 0
    printed = capsys.readouterr().out
    assert f"Skipped: --input_files={known_records}/train-2.tfrecord: record 13" in printed
    assert re.search(r"--input_files: 1 of \d+ records cannot be used", printed)
    assert metrics_of(tmp_path / "x")[-1]["corrupt_records"] == 1
    assert metrics_of(tmp_path / "x")[-1]["step"] == 24


def test_an_id_beyond_the_vocabulary_stops_the_run_at_its_record(
    small_records,
    known_records,  # noqa: F811
    tmp_path,
    capsys,
):
    path = known_records / "train-1.tfrecord"
    change = set_value("input_ids", 2, 65)
    rewritten(path, tmp_path / "changed", change, at=21)
    shutil.move(tmp_path / "changed", path)
    flags = [f for f in short(small_records, tmp_path / "x", 24) if "input_files" not in f]
    assert train(*flags, f"--input_files={known_records}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{path}: record 21: expected input_ids to be ids of the vocabulary" in error
    assert "Received: 65 at place 2" in error
