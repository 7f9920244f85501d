"""Runs whose files are all on gs://, through TensorFlow's own client, and what goes wrong there."""

import collections
import json
import os
import re
import subprocess
import sys
import time
from urllib.parse import unquote

import numpy as np
import pytest
import tensorflow as tf

from pretraining import files, inspect_data, make_data, make_vocab, run_lock
from pretraining.errors import InputError
from pretraining.metrics_log import MetricsLog, read
from pretraining.run_directory import RunDirectory
from tests.conftest import write_records
from tests.gcs_server import ROOT, gcs  # noqa: F401
from tests.test_run import assert_one_line, short, train

OBJECTS = [f"storage.objects.{right}" for right in ("get", "list", "create", "delete")]


@pytest.fixture
def data(gcs, small_records):  # noqa: F811
    """A folder in the test's bucket with the small records and their vocabulary."""
    for path in [*small_records.folder.glob("*.tfrecord"), small_records.folder / "vocab.txt"]:
        tf.io.gfile.copy(str(path), f"{gcs.bucket}/data/{path.name}")
    return f"{gcs.bucket}/data"


def flags_of(records, data, output_dir):
    return [
        *short(records, output_dir),
        f"--input_files={data}/train-*.tfrecord",
        f"--eval_files={data}/eval.tfrecord",
        f"--vocab_file={data}/vocab.txt",
    ]


def metrics_of(gcs, output_dir):  # noqa: F811
    lines = gcs.content(f"{output_dir}/metrics.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def at_step(monkeypatch, number, action):
    """Does something right after the metrics of training up to a step have been written."""
    plain = MetricsLog.write

    def write(log, step, metrics):
        plain(log, step, metrics)
        if step == number and "learning_rate" in metrics:  # no evaluation
            action()

    monkeypatch.setattr(MetricsLog, "write", write)


def objects_of(gcs, folder):  # noqa: F811
    """What a folder holds, by the rest of the name."""
    begin = len(folder.removeprefix(f"{gcs.bucket}/")) + 1
    names = [name for name in gcs.names(f"{folder}/") if len(name) > begin]
    return {name[begin:]: gcs.content(f"{gcs.bucket}/{name}") for name in names}


def put_objects(folder, objects):
    for name, content in objects.items():
        with tf.io.gfile.GFile(f"{folder}/{name}", "wb") as file:
            file.write(content)


def test_a_run_on_gs_through_a_kill_damage_and_failing_requests(
    gcs,  # noqa: F811
    data,
    small_records,
    monkeypatch,
    capsys,
):
    unbroken = f"{gcs.bucket}/runs/unbroken"
    flags = [
        *flags_of(small_records, data, unbroken),
        "--num_train_steps=9",
        "--save_every_steps=3",
    ]
    # The usual role for a bucket's objects does not let one ask for the bucket itself.
    gcs.deny("storage.buckets.get")
    for name, seconds in {"BEAT": 1.0, "LOOK": 0.1, "SETTLE": 0.0}.items():
        monkeypatch.setattr(run_lock, f"{name}_SECONDS", seconds)
    at_nine = {}

    def look_at_nine():
        assert train(*flags) == 2  # another run in the same folder
        at_nine.update(objects_of(gcs, unbroken))
        monkeypatch.setattr(run_lock, "BEAT_SECONDS", 15.0)  # the end waits that long for a beat

    with monkeypatch.context() as patch:
        at_step(patch, 9, look_at_nine)
        assert train(*flags) == 0
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: --output_dir={unbroken}: expected a folder for this run alone")
    assert f"one in which process {os.getpid()} on" in error and error.endswith("is at work")
    assert_nothing_is_written_often(gcs)
    expected = metrics_of(gcs, unbroken)
    assert [line["step"] for line in expected] == [3, 6, 9]
    before = objects_of(gcs, unbroken)
    assert json.loads(before["config.json"])["flags"]["output_dir"] == unbroken
    assert json.loads(before["summary.json"])["checkpoint"] == f"{unbroken}/checkpoints/ckpt-9"
    kept = {f"checkpoints/ckpt-{step}.index" for step in (3, 6, 9)}
    assert {name for name in before if name.endswith(".index")} == kept
    left_over = re.compile(r"temp|unfinished|\.parts|\.lock|\.write_test")
    assert not [name for name in before if left_over.search(name)]
    for kind in ("train", "eval"):
        assert any(f"tensorboard/{kind}/events" in name for name in before)
    assert train(*flags) == 0
    assert "This run is done: 9 updates." in capsys.readouterr().out
    assert objects_of(gcs, unbroken) == before

    # What a kill at step 9 leaves: parts of logs, the lock; and the newest checkpoint is damaged.
    broken = f"{gcs.bucket}/runs/broken"
    assert {".lock", "metrics.jsonl.parts/0000000003.jsonl"} <= set(at_nine)
    at_nine["checkpoints/ckpt-6.data-00000-of-00001"] = b"short"
    put_objects(broken, at_nine)
    flags[flags.index(f"--output_dir={unbroken}")] = f"--output_dir={broken}"
    gcs.deny()
    gcs.fail_every(5)
    monkeypatch.setattr(run_lock, "EXPIRY_SECONDS", 0.5)
    with monkeypatch.context() as patch:  # between two checkpoints the right to write is lost
        at_step(patch, 6, lambda: gcs.deny("storage.objects.create"))
        assert train(*flags) == 2
    printed = capsys.readouterr()
    assert f"process {os.getpid()} on" in printed.out and "was at work here last" in printed.out
    assert re.search("ckpt-6 is damaged .*Trying the one before", printed.out)
    assert f"Going on from {broken}/checkpoints/ckpt-3" in printed.out
    assert "Traceback" not in printed.err + printed.out
    last = printed.err.splitlines()[-1]
    assert last.startswith("error: ") and "storage.objects.create" in last and "bucket-" in last
    gcs.deny()
    gcs.fail_every(5, after=True)
    assert train(*flags) == 0
    assert f"Going on from {broken}/checkpoints/ckpt-3" in capsys.readouterr().out
    assert {503, 308} < {request.status for request in gcs.requests()}

    after = objects_of(gcs, broken)
    assert not [name for name in after if left_over.search(name)]
    found = metrics_of(gcs, broken)
    assert [line["step"] for line in found] == [3, 6, 9]
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "mlm_loss", "grad_norm", "learning_rate"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    steps = [json.loads(line)["step"] for line in after["evaluations.jsonl"].splitlines()]
    assert steps == [6, 9]
    assert points_of(gcs, broken) == points_of(gcs, unbroken)
    ends = [tf.train.load_checkpoint(f"{out}/checkpoints/ckpt-9") for out in (unbroken, broken)]
    for name in ends[0].get_variable_to_shape_map():
        if "VARIABLE_VALUE" in name and "model" in name:
            np.testing.assert_allclose(*(e.get_tensor(name) for e in ends), rtol=1e-3, atol=1e-5)


def assert_nothing_is_written_often(gcs):  # noqa: F811
    """Of three loops that each end in a checkpoint; the heartbeat of the lock aside."""
    requests = [r for r in gcs.requests() if "/.lock" not in unquote(r.name)]
    writes = collections.Counter(r.name for r in requests if r.action in ("create", "rewrite"))
    assert max(writes.values()) <= 5 and len(requests) < 500


def points_of(gcs, out):  # noqa: F811
    """The tags and steps of all TensorBoard events, each as often as it stands there."""
    points = collections.Counter()
    for name in gcs.names(f"{out}/tensorboard/"):
        if "tfevents" in name:
            for content in tf.data.TFRecordDataset(f"{gcs.bucket}/{name}").as_numpy_iterator():
                event = tf.compat.v1.Event.FromString(content)
                points.update((value.tag, event.step) for value in event.summary.value)
    return points


# What is taken away from whom, and what the line must hold.
REFUSED = {
    "no right to read": (("data", "get"), [], ["--input_files", "storage.objects.get"]),
    "no right to list": (("data", "list"), [], ["--input_files", "storage.objects.list"]),
    "vocabulary": (
        ("words", "get"),
        ["--vocab_file={words}/vocab.txt"],
        ["--vocab_file", "storage.objects.get"],
    ),
    "output get": (("output", "get"), [], ["--output_dir", "storage.objects.get"]),
    "output list": (("output", "list"), [], ["--output_dir", "storage.objects.list"]),
    "output create": (("output", "create"), [], ["--output_dir", "storage.objects.create"]),
    "output delete": (("output", "delete"), [], ["--output_dir", "storage.objects.delete"]),
    "no input bucket": (
        None,
        ["--input_files=gs://nowhere/train-*"],
        ["--input_files", "no such bucket: nowhere"],
    ),
    "no folder's bucket": (
        None,
        ["--input_files=gs://nowhere"],
        ["--input_files", "no such bucket: nowhere"],
    ),
    "no input object": (
        None,
        ["--input_files={data}/none.tfrecord"],
        ["--input_files", "none.tfrecord", "no file matches"],
    ),
    "no vocabulary": (
        None,
        ["--vocab_file={data}/none.txt"],
        ["--vocab_file", "none.txt", "no such object"],
    ),
    "no vocabulary bucket": (
        None,
        ["--vocab_file=gs://nowhere/vocab.txt"],
        ["--vocab_file", "no such bucket: nowhere"],
    ),
    "no bert config": (
        None,
        ["--bert_config_file={data}/none.json"],
        ["--bert_config_file", "no such object"],
    ),
    "no output bucket": (
        None,
        ["--output_dir=gs://nowhere/run"],
        ["--output_dir", "no such bucket: nowhere"],
    ),
    "no output bucket, deep": (
        None,
        ["--output_dir=gs://nowhere/a/b/run"],
        ["--output_dir", "no such bucket: nowhere"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_in_one_line(gcs, data, small_records, capsys, case):  # noqa: F811
    taken, more, words = REFUSED[case]
    places = {"data": data}
    for name in ("words", "output"):
        places[name] = gcs.make_bucket(f"{gcs.bucket.removeprefix('gs://')}-{name}")
    flags = flags_of(small_records, data, f"{places['output']}/run")
    flags += [flag.format(**places) for flag in more]
    if taken is not None:
        place, right = taken
        gcs.deny(f"storage.objects.{right}", bucket=places[place].removesuffix("/data"))
        words = [*words, places[place].split("/")[2]]
    before = len(gcs.requests())
    assert train(*flags) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert len(gcs.requests()) - before < 50  # refused for good: not tried again
    assert [n for n in gcs.names(places["output"]) if n not in ("run/", "run/.write_test")] == []


def test_no_answer_is_waited_for_and_then_named(gcs, data, small_records, capsys):  # noqa: F811
    gcs.fail_every(1)
    assert train(*flags_of(small_records, data, f"{gcs.bucket}/run")) == 2
    words = ["--input_files", "no answer", "11 tries", "503"]
    assert_one_line(capsys.readouterr().err, words)


def test_files_are_found_by_any_pattern_in_few_requests(gcs):  # noqa: F811
    b = gcs.bucket
    names = [f"a/x-{i:02d}.tfrecord" for i in range(40)]
    names += [
        "a/.x-40.tfrecord",
        "a/notes.txt",
        "a/b/y.tfrecord",
        "a/b.tfrecord/z.tfrecord",
        "t.tfrecord",
    ]
    for name in names:
        with tf.io.gfile.GFile(f"{b}/{name}", "w") as file:
            file.write(name)
    tf.io.gfile.mkdir(f"{b}/a/c.tfrecord")  # a folder by its marker alone
    gcs.deny("storage.buckets.get")
    before = len(gcs.requests())

    def found(patterns, **options):
        return [
            p.removeprefix(f"{b}/") for p in files.find_files(patterns, "--input_files", **options)
        ]

    assert found(f"{b}/a/x-0*.tfrecord") == names[:10]
    assert found(f"{b}/a") == found(f"{b}/a/") == names[:40]
    assert found(f"{b}/a/*.tfrecord") == [names[40], *names[:40]]
    assert found(f"{b}/a/*/*") == ["a/b.tfrecord/z.tfrecord", "a/b/y.tfrecord"]
    assert found(b) == found(f"{b}/") == ["t.tfrecord"]
    assert found(f"{b}/a", recursive=True) == sorted([*names[:40], *names[42:44]])
    assert found(b, recursive=True, in_folder="*.txt") == ["a/notes.txt"]
    assert found(f"{b}/t.tfrecord, {b}/a/b") == ["a/b/y.tfrecord", "t.tfrecord"]
    assert files.is_file(f"{b}/t.tfrecord", "--x") and not files.is_file(f"{b}/a", "--x")
    assert len(gcs.requests()) - before < 60
    for patterns in (f"{b}/a/n*.tfrecord", f"{b}/none", f"{b}/t.tfrecord,{b}/none"):
        with pytest.raises(InputError, match=r"--input_files=gs://\S+: .*no file matches"):
            files.find_files(patterns, "--input_files")


def test_a_listing_of_many_pages_is_read_to_its_end(gcs):  # noqa: F811
    gcs.page_size(7)
    for i in range(20):
        with tf.io.gfile.GFile(f"{gcs.bucket}/x/{i:02d}", "w") as file:
            file.write("x")
    found = files.find_files(f"{gcs.bucket}/x/*", "--input_files")
    assert found == [f"{gcs.bucket}/x/{i:02d}" for i in range(20)]


def test_a_run_directory_on_gs(gcs):  # noqa: F811
    directory = RunDirectory(f"{gcs.bucket}/a/run/")
    directory.create()
    directory.create()
    assert gcs.names(gcs.bucket) == ["a/run/"]
    assert directory.read_json("none.json") is None
    for value in (1, 2):
        directory.write_json("x.json", {"value": value})
        assert directory.read_json("x.json") == {"value": value}
    log = MetricsLog(directory.join("metrics.jsonl"), 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.flush()
    assert metrics_of(gcs, directory.path) == []  # they are in a part until the log is closed
    assert [m["step"] for m in read(directory.join("metrics.jsonl"))] == [1, 2, 3]
    log.close()
    assert [m["step"] for m in metrics_of(gcs, directory.path)] == [1, 2, 3]
    log = MetricsLog(directory.join("metrics.jsonl"), 2)  # a start from the checkpoint of step 2
    assert log.last == {"loss": 2.0}
    log.write(3, {"loss": 30.0})
    log.close()
    assert [m["loss"] for m in metrics_of(gcs, directory.path)] == [1, 2, 30]
    root = RunDirectory(gcs.bucket)
    root.create()
    root.write_json("x.json", {"value": 3})
    assert gcs.names(gcs.bucket) == ["a/run/", "a/run/metrics.jsonl", "a/run/x.json", "x.json"]


def test_records_go_from_the_writer_to_the_reader(gcs, small_records):  # noqa: F811
    """Beyond one block of TensorFlow's reader's buffer, and the writer's own copy on gs://."""
    path = f"{gcs.bucket}/big.tfrecord"
    content = np.random.default_rng(1).bytes(3 << 20)
    with tf.io.TFRecordWriter(path) as writer:
        for _ in range(3):
            writer.write(content)
    assert [r == content for r in tf.data.TFRecordDataset(path).as_numpy_iterator()] == [True] * 3
    assert len(gcs.content(path)) == 3 * (len(content) + 16)
    write_records(f"{gcs.bucket}/few.tfrecord", [[[5, 6, 7], [8, 9]]] * 4, small_records.words)
    assert files.is_file(f"{gcs.bucket}/few.tfrecord", "--x")


@pytest.mark.parametrize(
    ("error", "done", "words"),
    [
        (
            tf.errors.PermissionDeniedError(
                None,
                None,
                'Error executing an HTTP request: HTTP response code 401 with body \'{\n"error": {\n'
                '"code": 401,\n"message": "Anonymous caller does not have storage.objects.create '
                "access to the Google Cloud Storage object.\"}}'\n\t when uploading gs://b/x",
            ),
            "written",
            [
                "cannot be written",
                "credentials",
                "storage.objects.create",
                "bucket b",
                "401: Anonymous",
            ],
        ),
        (
            tf.errors.PermissionDeniedError(
                None,
                None,
                'Error executing an HTTP request: HTTP response code 403 with body \'{"error": {'
                '"message": "The billing account is disabled."}}\' when reading gs://b/x',
            ),
            "listed",
            ["bucket b refuses", "storage.objects.list", "403: The billing account is disabled."],
        ),
        (tf.errors.ResourceExhaustedError(None, None, "disk\nfull"), "written", ["disk full"]),
        (OSError(28, "No space left on device"), "written", ["No space left"]),
    ],
)
def test_why_is_a_line_that_says_what_to_do(error, done, words):
    line = files.why(error, "gs://b/x", done)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_what_comes_up_in_the_middle_of_something_names_the_path(gcs):  # noqa: F811
    with tf.io.TFRecordWriter(f"{gcs.bucket}/x") as writer:
        writer.write(b"x")
    gcs.deny("storage.objects.get")
    with (
        pytest.raises(
            InputError, match=r"^gs://bucket-\d+/x cannot be read: .*storage.objects.get"
        ),
        files.explained(),
    ):
        list(tf.data.TFRecordDataset(f"{gcs.bucket}/x"))
    gcs.deny("storage.buckets.get")
    with pytest.raises(InputError, match=r"403: .*storage.buckets.get"), files.explained():
        tf.io.gfile.stat(gcs.bucket)
    with pytest.raises(tf.errors.InvalidArgumentError), files.explained():
        tf.reshape([1, 2], [3])


def test_the_server_ends_with_a_process_that_is_killed():
    program = (
        "from tests.gcs_server import Gcs; g = Gcs(); print(g._process.pid, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server = int(process.stdout.readline())
    os.kill(server, 0)
    process.kill()
    process.wait()
    for _ in range(100):
        time.sleep(0.1)
        status = re.search(r"State:\s+(\w)", _read(f"/proc/{server}/status"))
        if status is None or status[1] == "Z":
            return
    raise AssertionError("the server lives on")


def _read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def test_text_on_gs_becomes_the_records_that_it_becomes_on_disk(gcs, tmp_path, capsys):  # noqa: F811
    """Vocabulary, records and manifest on gs://, one request in nine answered with a 503."""
    rng = np.random.default_rng(0)
    words = [f"word{chr(97 + i)}" for i in range(26)]
    documents = [
        "\n".join(" ".join(rng.choice(words, 9)) + "." for _ in range(12)) for _ in range(40)
    ]
    text = "\n\n".join(documents)
    (tmp_path / "text.txt").write_text(text)
    files.write(f"{gcs.bucket}/text/text.txt", text)
    gcs.fail_every(9)
    outputs = {}
    for folder in (str(tmp_path), f"{gcs.bucket}"):
        source = f"{folder}/text" if folder == gcs.bucket else f"{folder}/text.txt"
        vocab = f"--vocab_file={folder}/vocab.txt"
        learn = [f"--input={source}", f"--output={folder}/vocab.txt", "--vocab_size=120"]
        assert make_vocab.main(["make_vocab", *learn]) == 0
        make = [f"--input={source}", vocab, f"--output_dir={folder}/made", "--dupe_factor=2"]
        make += ["--num_shards=2", "--max_seq_length=32", "--workers=1"]
        assert make_data.main(["make_data", *make]) == 0, capsys.readouterr().err
        inspect = [f"--input_files={folder}/made", vocab, "--examples=0"]
        assert inspect_data.main(["inspect_data", *inspect]) == 0
        names = sorted(n for n in tf.io.gfile.listdir(f"{folder}/made") if "tfrecord" in n)
        outputs[folder] = {n: files.read(f"{folder}/made/{n}", "") for n in names}
    local, remote = outputs.values()
    assert len(local) == 2 and local == remote
    assert any(status == 503 for *_, status in gcs.requests())
    # What is complete is left alone; where nothing may be written, that is said.
    assert make_data.main(["make_data", *make]) == 0
    gcs.deny("storage.objects.create")
    assert make_data.main(["make_data", *make, f"--output_dir={gcs.bucket}/other"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "storage.objects.create" in error and gcs.bucket.removeprefix("gs://") in error
