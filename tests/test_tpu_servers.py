"""What is said of the TensorFlow servers of a TPU, played by sockets of this machine."""

import http.server
import socket
import threading

import pytest

from tpu import tpu_servers
from tpu.installation import Distribution
from tpu.local_tpu import Machine


@pytest.fixture
def listening(monkeypatch):
    """Address of a socket that takes connections; port 1 stands for that of version requests."""
    monkeypatch.setattr(tpu_servers, "VERSION_PORT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_all_that_do_not_answer_are_found(listening):
    (silent,) = tpu_servers.knock([listening, "127.0.0.1:1"])
    assert silent.startswith("127.0.0.1:1 (")
    assert tpu_servers.silent_fault((listening,), "tpu-vm-tf-2.20.0") is None
    fault = tpu_servers.silent_fault((listening, "127.0.0.1:1"), "tpu-ubuntu2204-base")
    assert "at 1 of its 2 workers: 127.0.0.1:1" in fault.what
    assert "its runtime, tpu-ubuntu2204-base" in fault.remedy


def test_addresses_that_answer(listening):
    assert tpu_servers.address_fault(f"grpc://{listening},grpc://{listening}", "2.20.0") is None


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("grpc://127.0.0.1:1", ["nothing answers at 127.0.0.1:1", "READY", "8470"]),
        ("grpc://127.0.0.1", ["expected grpc://host:port", "Received: grpc://127.0.0.1."]),
        ("http://127.0.0.1:1", ["Received: http://127.0.0.1:1"]),
        ("grpc://127.0.0.1:99999", ["expected grpc://host:port"]),
        ("grpc://a:1,b:1", ["Received: b:1"]),
    ],
)
def test_addresses_that_cannot_work(address, words):
    text = str(tpu_servers.address_fault(address, "2.20.0"))
    assert all(word in text for word in words), text


def test_a_server_of_another_version_is_told(listening, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/requestversion"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"currentVersion": "2.9.1"}')

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(tpu_servers, "VERSION_PORT", server.server_port)
        fault = tpu_servers.address_fault(f"grpc://{listening}", "2.20.0")
        server.shutdown()
    assert "2.20.0, on the TPU. Received: 2.9.1" in fault.what


@pytest.mark.parametrize(
    ("chips", "build", "value", "is_wrong"),
    [
        (4, "tensorflow-tpu", None, True),
        (4, "tensorflow-tpu", "1", True),
        (4, "tensorflow-tpu", "0", False),
        (4, "tensorflow", None, False),  # it has no driver of chips
        (0, "tensorflow-tpu", None, False),
    ],
)
def test_a_controller_leaves_the_chips_to_the_server(chips, build, value, is_wrong, monkeypatch):
    monkeypatch.delenv("TPU_LOAD_LIBRARY", raising=False)
    if value:
        monkeypatch.setenv("TPU_LOAD_LIBRARY", value)
    installed = {build: Distribution(build, "2.20.0", claims_tensorflow=True)}
    fault = tpu_servers.library_fault(Machine(chips), installed)
    assert bool(fault) == is_wrong
    assert not fault or "export TPU_LOAD_LIBRARY=0" in fault.remedy
