"""One run at a time in a folder: by flock on a disk, by a heartbeat on gs://."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import tensorflow as tf

from pretraining import run_lock as module
from pretraining.errors import InputError
from pretraining.run_lock import run_lock
from tests.gcs_server import gcs  # noqa: F401

OTHER = {"token": "t", "host": "elsewhere", "pid": 123, "process": "boot pid:[1] 99", "beats": 7}


@pytest.fixture
def out(gcs, monkeypatch):  # noqa: F811
    """A folder on gs://, and a clock that is fast but for what would end a wait too early."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 120.0)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    yield f"{gcs.bucket}/run"
    wait_until(lambda: "run lock" not in {t.name for t in threading.enumerate()})


def put(out, record):
    text = record if isinstance(record, str) else json.dumps(record)
    with tf.io.gfile.GFile(f"{out}/.lock", "w") as file:
        file.write(text.ljust(module.RECORD_BYTES))


def record_of(gcs, out):  # noqa: F811
    return json.loads(gcs.content(f"{out}/.lock"))


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def assert_refused(out, words):
    with pytest.raises(InputError) as raised, run_lock(str(out)):
        pass
    text = str(raised.value)
    assert text.startswith(f"--output_dir={out}: expected a folder for this run alone. Received: ")
    assert words in text and "\n" not in text


def test_a_folder_on_disk_has_one_run(tmp_path):
    with run_lock(str(tmp_path)) as lock:
        lock.check()
        assert_refused(tmp_path, f"process {os.getpid()} is at work")
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with run_lock(str(tmp_path)) as lock:
        (tmp_path / ".lock").rename(tmp_path / "elsewhere")
        for content in (None, str(os.getpid())):  # removed; made anew by another run
            if content:
                (tmp_path / ".lock").write_text(content)
            with pytest.raises(InputError, match=r"--output_dir=\S+: .* removed or replaced"):
                lock.check()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys\n"
            "file = open(sys.argv[1], 'w')\n"
            "fcntl.flock(file, fcntl.LOCK_EX)\n"
            "print(os.getpid(), file=file, end='', flush=True)\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()\n",
            tmp_path / ".lock",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    assert_refused(tmp_path, f"process {holder.pid} is at work")
    holder.kill()
    holder.communicate()
    with run_lock(str(tmp_path)):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def unknown(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with run_lock(str(tmp_path)) as lock:
        lock.check()
    assert "knows no locks (Function not implemented)" in capsys.readouterr().out


def test_on_gs_the_heart_of_the_first_run_keeps_out_a_second(gcs, out, capsys):  # noqa: F811
    with run_lock(out) as lock:
        assert_refused(out, f"process {os.getpid()} on {socket.gethostname()} is at work")
        assert "Waiting for up to 120 s" in capsys.readouterr().out
        beats = record_of(gcs, out)["beats"]
        wait_until(lambda: record_of(gcs, out)["beats"] > beats + 1)
        assert len(gcs.content(f"{out}/.lock")) == module.RECORD_BYTES
        lock.check()
    assert not gcs.names(out)
    with run_lock(out):
        pass
    assert not gcs.names(out) and not capsys.readouterr().out


@pytest.mark.parametrize("left", [OTHER, "garbage", "[1]"])
def test_a_heart_that_stands_still_is_that_of_a_dead_run(gcs, out, monkeypatch, capsys, left):  # noqa: F811
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 0.3)
    put(out, left)
    with run_lock(out):
        assert record_of(gcs, out)["pid"] == os.getpid()
    name = "process 123 on elsewhere" if left is OTHER else "process ? on ?"
    assert f"{out}: {name} was at work here last. Waiting" in capsys.readouterr().out
    assert not gcs.names(out)


@pytest.mark.parametrize("change", ["beats", "ends"])
def test_a_run_that_stirs_while_it_is_watched(gcs, out, monkeypatch, change):  # noqa: F811
    put(out, OTHER)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            put(out, {**OTHER, "beats": 8})
            if change == "ends":
                tf.io.gfile.remove(f"{out}/.lock")

    clock = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", clock)
    if change == "ends":
        with run_lock(out) as lock:
            lock.check()
    else:
        assert_refused(out, "process 123 on elsewhere is at work")
        assert record_of(gcs, out) == {**OTHER, "beats": 8}
    assert looks[:3] == [0.01] * 3


def test_a_dead_process_of_this_machine_is_not_waited_for(gcs, out, capsys):  # noqa: F811
    child = subprocess.Popen(["sleep", "600"])
    process = module._process(child.pid)
    record = {**OTHER, "host": socket.gethostname(), "pid": child.pid, "process": process}
    boot, namespace, start = process.split()
    assert not module._is_dead(record)
    # Another process under the same number, and the same number elsewhere.
    assert module._is_dead({**record, "process": f"{boot} {namespace} {int(start) - 1}"})
    assert not module._is_dead({**record, "process": f"other {namespace} {int(start) - 1}"})
    assert not module._is_dead({**record, "process": f"{boot} pid:[1] {int(start) - 1}"})
    assert not module._is_dead({**record, "process": None})
    child.kill()
    wait_until(lambda: module._is_dead(record))  # a zombie already is
    child.wait()
    assert module._is_dead(record)
    put(out, record)
    with run_lock(out):
        pass
    assert not capsys.readouterr().out


def test_of_two_that_start_at_once_one_is_refused(gcs, out, monkeypatch):  # noqa: F811
    clock = types.SimpleNamespace(sleep=lambda _: put(out, OTHER), monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", clock)
    assert_refused(out, "process 123 on elsewhere has started at the same moment")
    assert record_of(gcs, out) == OTHER


def test_a_run_that_was_taken_for_dead_stops_and_leaves_the_other_alone(gcs, out):  # noqa: F811
    with run_lock(out) as lock:
        lock.check()
        # It may be in the middle of a beat, and would overwrite it: that race it wins.
        wait_until(lambda: put(out, OTHER) or lock._taken_by)
        with pytest.raises(InputError, match="process 123 on elsewhere has taken over"):
            lock.check()
    assert record_of(gcs, out) == OTHER


def test_a_network_that_fails_is_borne_until_nobody_can_tell(gcs, out, monkeypatch):  # noqa: F811
    with run_lock(out) as lock:
        gcs.deny("storage.objects.get", "storage.objects.create")
        count = len(gcs.requests())
        wait_until(lambda: len(gcs.requests()) > count + 3)
        lock.check()
        monkeypatch.setattr(module, "EXPIRY_SECONDS", module.BEAT_SECONDS)
        with pytest.raises(InputError, match=r"another run may have taken over: cannot be written"):
            lock.check()
        gcs.deny()
        lock.check()
        beats = record_of(gcs, out)["beats"]
        wait_until(lambda: record_of(gcs, out)["beats"] > beats)
        tf.io.gfile.remove(f"{out}/.lock")  # by hand, say
        wait_until(lambda: gcs.names(out))
    assert not gcs.names(out)


def test_a_folder_that_cannot_be_asked_is_named(gcs, out):  # noqa: F811
    for right in ("get", "create"):
        gcs.deny(f"storage.objects.{right}")
        with pytest.raises(InputError, match=rf"^--output_dir.*storage\.objects\.{right}"):
            run_lock(out).__enter__()
    gcs.deny()
    assert not gcs.names(out)
