"""The TPU chips of this machine, played by folders, and what Google tells of it, by a server."""

import http.server
import os
import threading

import pytest

from tpu import local_tpu
from tpu.installation import Distribution
from tpu.local_tpu import Machine

INSTALLED = {
    d.name: d
    for d in (
        Distribution("tensorflow-tpu", "2.20.0", ("libtpu~=0.0.14",), claims_tensorflow=True),
        Distribution("libtpu", "0.0.30"),
    )
}


@pytest.fixture
def metadata(monkeypatch):
    """What Google's metadata server answers, by path; any other path is 404."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = answers.get(self.path.removeprefix("/computeMetadata/v1/"))
            is_asked_well = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if value is not None and is_asked_well else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        yield answers
        server.shutdown()


def add_chips(root, count, device="0x0027"):
    for i in range(count):
        folder = root / f"sys/bus/pci/devices/0000:00:0{i}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{device}\n")


def add_process(root, pid, name, *held):
    (root / f"proc/{pid}/fd").mkdir(parents=True)
    (root / f"proc/{pid}/comm").write_text(f"{name}\n")
    for number, target in enumerate(held):
        os.symlink(target, root / f"proc/{pid}/fd/{number}")


def test_a_machine_without_chips(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    add_chips(tmp_path, 1, device="0x0042")  # Google's network card
    (tmp_path / "dev/vfio").mkdir(parents=True)  # of any machine that hands devices on
    assert local_tpu.read_machine(tmp_path, {}) == Machine()
    assert "without TPU chips" in local_tpu.fault(Machine(), INSTALLED).what


def test_chips_are_counted_on_the_bus_or_as_devices(tmp_path):
    (tmp_path / "dev").mkdir()
    for i in range(4):
        (tmp_path / f"dev/accel{i}").touch()
    assert local_tpu.chips(tmp_path) == 4
    add_chips(tmp_path, 8, device="0x0063")
    assert local_tpu.chips(tmp_path) == 8


def test_google_tells_the_slice(tmp_path, metadata):
    add_chips(tmp_path, 4)
    metadata["instance/attributes/accelerator-type"] = "v3-32"
    hosts = ",".join(f"unknown:unknown:10.0.0.{i}" for i in range(4))
    metadata["instance/attributes/worker-network-endpoints"] = hosts
    assert local_tpu.read_machine(tmp_path, {}) == Machine(4, "v3-32", 4)
    # One who takes a single machine of the slice on purpose, and Kubernetes.
    assert local_tpu.read_machine(tmp_path, {"TPU_PROCESS_BOUNDS": "1,1,1"}).hosts == 1
    assert local_tpu.read_machine(tmp_path, {"TPU_WORKER_HOSTNAMES": "a,b"}).hosts == 2


def test_a_metadata_server_that_knows_nothing_is_no_trouble(tmp_path, metadata):
    add_chips(tmp_path, 4)
    assert local_tpu.read_machine(tmp_path, {}) == Machine(4)


def test_a_process_that_holds_the_chips_is_named(tmp_path):
    add_process(tmp_path, 7, "sh", "/dev/null")
    add_process(tmp_path, os.getpid(), "pytest", "/dev/accel0")
    assert local_tpu.holder(tmp_path) == ""
    add_process(tmp_path, 4711, "python3", "/dev/null", "/dev/vfio/0")
    assert local_tpu.holder(tmp_path) == "4711 (python3)"


def test_a_process_of_another_user_shows_by_its_lock(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "proc").mkdir()
    lock = tmp_path / "tmp/libtpu_lockfile"
    lock.touch()
    line = "{}: POSIX  ADVISORY  WRITE {} fe:00:{} 0 EOF\n"
    table = line.format(1, 99, 1) + line.format(2, 4711, lock.stat().st_ino)
    (tmp_path / "proc/locks").write_text(table)
    assert local_tpu.holder(tmp_path) == "4711"


CPU_BUILD = {"tensorflow": Distribution("tensorflow", "2.20.0", (), claims_tensorflow=True)}
OLD_LIBRARY = INSTALLED | {"libtpu": Distribution("libtpu", "0.1.0")}
FAULTS = {
    "not a TPU VM": (Machine(), INSTALLED, ["without TPU chips", "tpu.cloud create"]),
    "no device in the container": (
        Machine(0, "v3-8"),
        INSTALLED,
        ["belongs to a v3-8", "--privileged"],
    ),
    "build": (
        Machine(4, "v3-8"),
        CPU_BUILD,
        ["tensorflow-tpu==2.20.0", "pip uninstall -y tensorflow"],
    ),
    "two builds": (Machine(4, "v3-8"), INSTALLED | CPU_BUILD, ["one distribution", "overwritten"]),
    "libtpu": (Machine(4, "v3-8"), OLD_LIBRARY, ["ends its process", "Received: libtpu 0.1.0"]),
    "pod": (
        Machine(4, "v3-32", 4),
        INSTALLED,
        ["one of the 4 machines of v3-32", "TPU_LOAD_LIBRARY=0"],
    ),
    "busy": (Machine(4, "v3-8", 1, "4711 (python3)"), INSTALLED, ["busy", "kill 4711"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_reason_has_its_own_words(name):
    machine, installed, words = FAULTS[name]
    fault = local_tpu.fault(machine, installed)
    assert "\n" not in str(fault)
    assert all(word in str(fault) for word in words), fault


def test_the_reasons_differ():
    assert len({local_tpu.fault(m, i).what for m, i, _ in FAULTS.values()}) == len(FAULTS)


def test_local_does_not_go_with_a_library_that_stays_unloaded(monkeypatch):
    monkeypatch.setenv("TPU_LOAD_LIBRARY", "0")
    assert "unset TPU_LOAD_LIBRARY" in local_tpu.fault(Machine(4, "v3-8"), INSTALLED).remedy


def test_a_tpu_vm_that_is_free_can_be_used(monkeypatch):
    monkeypatch.delenv("TPU_LOAD_LIBRARY", raising=False)
    assert local_tpu.fault(Machine(4, "v3-8"), INSTALLED) is None
