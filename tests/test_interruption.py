"""Requests to stop: signals, the notices of Google's metadata server, and time to obey them."""

import contextlib
import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from pretraining import preemption
from pretraining.interruption import stop_requests
from tpu import local_tpu

ROOT = pathlib.Path(__file__).parents[1]
KEYS = ("preempted", "maintenance-event")


@contextlib.contextmanager
def metadata_server(answers):
    """Serves the answers of each key one after the other, the last for ever.

    An answer is a status and a body, None to cut the connection, or an Event to wait for first.
    """
    asked = {key: [] for key in KEYS}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            prefix, _, key = path.rpartition("/")
            assert prefix == "/computeMetadata/v1/instance"
            count = len(asked[key])
            asked[key].append((query, self.headers["Metadata-Flavor"]))
            answer = answers[key][min(count, len(answers[key]) - 1)]
            if isinstance(answer, threading.Event):
                answer.wait(60)
                answer = None
            if answer is None:
                self.close_connection = True
                return
            status, body = answer
            self.send_response(status)
            self.send_header("ETag", f"etag{count}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def watchers():
    return [t for t in threading.enumerate() if t.name.endswith(" notice") and t.is_alive()]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No machine of Google's, whatever this one is, and no waiting between questions."""
    wait_until(lambda: not watchers())
    for name in ("GCE_METADATA_HOST", "NO_GCE_CHECK"):
        monkeypatch.delenv(name, raising=False)
    # A proxy for everything else, which nobody serves.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(local_tpu, "_PRODUCT_NAME", str(tmp_path / "product_name"))
    monkeypatch.setattr(preemption, "PAUSE_SECONDS", 0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_are_given_back(number, capfd):
    before = signal.getsignal(number)
    with stop_requests() as requests:
        assert requests == [] and not watchers()
        os.kill(os.getpid(), number)
        assert requests == [number.name]
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests == [number.name, "SIGTERM"]
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.startswith(f"{number.name}: stopping at the end of this loop\n")


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_ctrl_c_ends_at_once(first):
    program = (
        "import os, signal\n"
        "from pretraining.interruption import stop_requests\n"
        "with stop_requests():\n"
        f"    os.kill(os.getpid(), signal.{first})\n"
        "    print('on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == "on\n"
    assert "Traceback" not in done.stderr


TROUBLE = [(404, b"TRUE"), (503, b"TRUE"), None, (200, b"\xff\xfe<html>"), (200, b"")]


@pytest.mark.parametrize(
    ("key", "quiet", "says", "name"),
    [
        ("preempted", b"FALSE", b"TRUE", "preemption notice"),
        ("maintenance-event", b"NONE", b"TERMINATE_ON_HOST_MAINTENANCE", "maintenance notice"),
        ("maintenance-event", b"MIGRATE_ON_HOST_MAINTENANCE", b"TERMINATE\n", "maintenance notice"),
    ],
)
def test_a_notice_stops_the_run_whatever_the_server_said_before(
    monkeypatch, capfd, key, quiet, says, name
):
    notice = [(200, quiet), *TROUBLE, (200, quiet), (200, quiet), (200, says)]
    answers = {"preempted": [(200, b"FALSE")], "maintenance-event": [(200, b"NONE")], key: notice}
    with metadata_server(answers) as (host, asked):
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        monkeypatch.setenv("NO_GCE_CHECK", "true")  # says nothing about a server that is named
        with stop_requests() as requests:
            wait_until(lambda: requests)
            assert requests == [name]
            # A Ctrl-C now is the first, and asks to stop as well.
            os.kill(os.getpid(), signal.SIGINT)
            assert requests == [name, "SIGINT"]
        wait_until(lambda: not watchers())
    assert len(asked[key]) == len(notice)
    assert all(flavor == "Google" for _, flavor in asked[key])
    queries = [query for query, _ in asked[key]]
    # The first answer at once; then the next change; anew after each failure.
    changes = [q.replace("wait_for_change=true&timeout_sec=60&last_etag=", "") for q in queries]
    assert changes == ["", "etag0", "", "", "", "etag4", "etag5", "etag6", "etag7"]
    err = capfd.readouterr().err
    assert err.startswith(f"{name}: stopping at the end of this loop\n") and err.count("\n") == 2


def test_a_maintenance_announced_before_the_start_does_not_stop_it_again(monkeypatch):
    answers = {"preempted": [(200, b"FALSE")], "maintenance-event": [(200, b"TERMINATE")] * 9}
    with metadata_server(answers) as (host, asked):
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with stop_requests() as requests:
            wait_until(lambda: len(asked["maintenance-event"]) > 2)
            assert requests == []
        wait_until(lambda: not watchers())


def test_nothing_is_noted_once_the_run_is_over(monkeypatch):
    held = threading.Event()
    with metadata_server({key: [(200, b"FALSE"), held, (200, b"TRUE")] for key in KEYS}) as served:
        host, asked = served
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with stop_requests() as requests:
            wait_until(lambda: all(len(asked[key]) == 2 for key in KEYS))
        held.set()
        wait_until(lambda: not watchers())
    assert requests == [] and all(len(asked[key]) == 2 for key in KEYS)


def test_google_is_asked_on_its_own_machines_only(monkeypatch, tmp_path):
    assert local_tpu.metadata_host() == ""
    (tmp_path / "product_name").write_text("Standard PC (Q35 + ICH9, 2009)\n")
    assert local_tpu.metadata_host() == ""
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert local_tpu.metadata_host() == "metadata.google.internal"
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert local_tpu.metadata_host() == ""
    monkeypatch.setenv("GCE_METADATA_HOST", "169.254.169.254")
    assert local_tpu.metadata_host() == "169.254.169.254"


@pytest.mark.parametrize(
    ("loop", "save", "steps", "words"),
    [
        (10.0, 15.0, 100, None),
        (25.0, 1.0, 100, "--steps_per_loop=96 would do"),
        (50.0, 5.0, 10, "--steps_per_loop=4 would do"),
        (20.0, 24.0, 10, "One update alone takes longer"),
        (1.0, 25.0, 10, "The save alone takes longer"),
        (0.0, 100.0, 10, None),  # a loop that compiled
    ],
)
def test_a_loop_and_a_save_that_outlast_the_notice_are_told_once(loop, save, steps, words):
    timer = preemption.SaveTimer(steps)
    assert timer.warning(0.0, 99.0) is None
    warning = timer.warning(loop, save)
    if words is None:
        assert warning is None
        return
    assert words in warning and "\n" not in warning
    if "would do" in words:  # and it would
        proposed = int(words.split("=")[1].split()[0])
        assert loop * proposed / steps + save <= 25 < loop * (proposed + 1) / steps + save
    assert timer.warning(loop, save) is None
