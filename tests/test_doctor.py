"""The lines of the doctor: whole installations, everything that can be wrong, and none that hides another."""

import os
import subprocess
import sys
import time

import pytest

from tests.cloud_server import TOKEN, cloud  # noqa: F401
from tests.gcs_server import gcs  # noqa: F401
from tpu import doctor, installation, local_tpu, named_tpu, tpu_servers, trials
from tpu.failures import Fault
from tpu.installation import Distribution

TENSORFLOW = Distribution("tensorflow", "2.20.0", (), claims_tensorflow=True)
TPU_BUILD = Distribution("tensorflow-tpu", "2.20.0", ("libtpu~=0.0.14",), claims_tensorflow=True)


@pytest.fixture(scope="module")
def installed():
    """What is installed here, read once."""
    return installation.read_installation()


@pytest.fixture(autouse=True)
def here(installed, monkeypatch):
    """Trials in this process, on a machine that is not Google's."""
    monkeypatch.setattr(installation, "read_installation", lambda: installed)
    monkeypatch.setattr(doctor, "trial", lambda seconds, kind, *rest: trials.TRIALS[kind](*rest))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


def lines(capsys, *argv):
    """Runs the doctor; returns its exit status and what it says by the name of the line."""
    status = doctor.main(list(argv))
    said = {}
    for line in capsys.readouterr().out.splitlines()[:-1]:
        word, _, rest = line.partition(" ")
        name, _, text = rest.strip().partition(": ")
        said[name] = (word, text)
    return status, said


def with_installed(monkeypatch, *distributions, machine=local_tpu.Machine()):  # noqa: B008
    installed = {d.name: d for d in distributions}
    monkeypatch.setattr(installation, "read_installation", lambda: installed)
    monkeypatch.setattr(local_tpu, "read_machine", lambda: machine)


def test_nothing_is_wrong_with_the_machine_of_these_tests(capsys):
    status, said = lines(capsys)
    assert status == 0
    assert {word for word, _ in said.values()} <= {"ok", "skipped"}
    assert [said[name][0] for name in ("TPU", "TPU computes", "bucket")] == ["skipped"] * 3
    assert said["TensorFlow"][1].startswith("tensorflow 2.")


def test_as_a_program_each_trial_is_a_process_of_its_own():
    """The one run of the whole program, in which TensorFlow starts."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tpu.doctor", "--tpu=grpc://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1, done.stderr
    assert "ok       start: 2." in done.stdout
    assert "WRONG    TPU: nothing answers at 127.0.0.1:1" in done.stdout
    assert done.stderr == ""


def test_a_device_that_answers_has_computed_something():
    assert trials.device("", "", "") == "1 replica on CPU compute"


def test_a_device_that_is_not_there_is_told_as_a_run_would():
    with pytest.raises(Fault) as raised:
        trials.device("grpc://127.0.0.1:1", "", "")
    assert (
        raised.value.what
        == "--tpu=grpc://127.0.0.1:1: nothing answers at 127.0.0.1:1 (Connection refused)"
    )
    assert raised.value.remedy.startswith("Tried: ")


def test_two_builds_are_wrong_on_any_machine(capsys, monkeypatch):
    with_installed(monkeypatch, TENSORFLOW, TPU_BUILD, Distribution("libtpu", "0.0.30"))
    status, said = lines(capsys)
    assert status == 1
    word, text = said["TensorFlow"]
    assert word == "WRONG"
    assert " : pip uninstall -y tensorflow-tpu && pip install" in text
    assert said["versions"][0] == "ok"
    assert said["memory"][0] == "ok"


def test_on_a_tpu_vm_the_other_build_is_wanted(capsys, monkeypatch):
    with_installed(monkeypatch, TENSORFLOW, machine=local_tpu.Machine(4, "v3-8"))
    status, said = lines(capsys, "--tpu=local")
    assert status == 1
    assert "tensorflow-tpu==2.20.0" in said["TensorFlow"][1]
    assert said["TPU"][0] == "WRONG"
    assert said["TPU computes"] == ("skipped", "see the line above")


def test_each_version_that_does_not_fit_has_its_command(capsys, monkeypatch):
    text = Distribution("tensorflow-text", "2.18.0", ("tensorflow<2.19,>=2.18",))
    with_installed(monkeypatch, TPU_BUILD, text)
    status, said = lines(capsys)
    assert status == 1
    assert "libtpu~=0.0.14. Received: none" in said["versions"][1]
    assert "--no-deps 'tensorflow-text==2.20.*'" in said["versions"][1]


def test_a_name_needs_the_extra_tpu(capsys, monkeypatch):
    ours = Distribution("lamb-tf", "0.1.0", ('cloud-tpu-client; extra == "tpu"',))
    with_installed(monkeypatch, ours, TENSORFLOW)
    monkeypatch.setattr(named_tpu, "find", lambda *_: named_tpu.Node("pod", "CREATING"))
    assert lines(capsys)[1]["extra tpu"][0] == "skipped"
    status, said = lines(capsys, "--tpu=pod")
    assert status == 1
    word, text = said["extra tpu"]
    assert word == "WRONG"
    assert text.endswith(" : pip install -e '.[tpu]' -c constraints.txt")


def test_a_healthy_tpu_and_a_sick_one(cloud, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tpu_servers, "knock", lambda addresses: [])
    monkeypatch.setitem(trials.TRIALS, "device", lambda *arguments: f"computes {arguments}")
    flags = ["--tpu=pod", "--tpu_zone=us-central1-a", "--gcp_project=proj"]
    cloud.add_node("pod", "READY", workers=4, health="HEALTHY")
    status, said = lines(capsys, *flags)
    assert status == 0
    assert said["TPU"] == ("ok", "v3-8 READY, tf, HEALTHY, 4 workers answer")
    assert said["TPU computes"] == ("ok", "computes ('pod', 'us-central1-a', 'proj')")

    cloud.add_node("pod", "READY", health="UNHEALTHY_MAINTENANCE")
    status, said = lines(capsys, *flags)
    assert status == 1
    assert "UNHEALTHY_MAINTENANCE" in said["TPU"][1]
    assert TOKEN not in str(said)


def test_a_bucket_with_all_rights(gcs, capsys):  # noqa: F811
    status, said = lines(capsys, f"--bucket={gcs.bucket}/some/folder")
    assert status == 0
    assert said["bucket"][1].endswith(
        "can be written to, listed, overwritten in, read and deleted from"
    )
    assert gcs.names(gcs.bucket) == []
    assert {r.name.split("/")[0] for r in gcs.requests() if r.name} == {"some"}


@pytest.mark.parametrize(
    ("right", "step", "is_left"),
    [
        ("create", "written to", False),
        ("list", "listed", False),
        ("get", "read", False),
        ("delete", "overwritten in", True),
    ],
)
def test_a_right_that_is_missing_is_named(gcs, capsys, right, step, is_left):  # noqa: F811
    gcs.deny(f"storage.objects.{right}")
    status, said = lines(capsys, f"--bucket={gcs.bucket}")
    word, text = said["bucket"]
    assert (status, word) == (1, "WRONG")
    assert f"{gcs.bucket} cannot be {step} (" in text
    assert f"storage.objects.{right}" in text
    assert f"add-iam-policy-binding {gcs.bucket} " in text
    assert ("is left behind" in text) == is_left
    gcs.deny()
    assert len(gcs.names(gcs.bucket)) == is_left


def test_a_bucket_that_is_not_there(gcs, capsys):  # noqa: F811
    word, text = lines(capsys, "--bucket=gs://nowhere-at-all")[1]["bucket"]
    assert word == "WRONG"
    assert "gcloud storage buckets create gs://nowhere-at-all" in text


@pytest.mark.parametrize("value", ["gs://", "/tmp/folder", "bucket"])
def test_what_is_no_bucket_is_refused(value, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--bucket={value}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --bucket: expected ")


def test_a_line_that_breaks_or_hangs_hides_no_other(capsys, monkeypatch):
    def breaks(*_):
        raise ZeroDivisionError("of this test\nin two lines")

    monkeypatch.setattr(installation, "version_faults", breaks)
    monkeypatch.setattr(doctor, "LOOK_SECONDS", -4.5)
    monkeypatch.setattr(doctor, "disk", lambda: time.sleep(5))
    status, said = lines(capsys)
    assert status == 1
    assert said["versions"] == ("WRONG", "ZeroDivisionError: of this test in two lines")
    assert said["disk"][1].startswith("no answer within ")
    assert said["start"][0] == "ok"
    assert list(said)[-1] == "bucket"


@pytest.mark.parametrize(
    ("output", "errors", "word"),
    [
        ('noise\n{"what": "no TPU", "remedy": "look"}\n', "", "no TPU. look"),
        (
            "",
            "warning\nerror: --tpu=pod: no answer within 40 s. Tried: x\n",
            "--tpu=pod: no answer within 40 s",
        ),
        ("", "Illegal instruction\n", "status 132: Illegal instruction"),
        ("", "", "no message"),
    ],
)
def test_what_a_trial_leaves_behind_is_read(output, errors, word):
    with pytest.raises(Fault, match=word):
        trials.read_result(132, output, errors)


def test_a_trial_is_ended_in_time(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\n[ "$3" = start ] && exec sleep 5\necho "{\\"ok\\": \\"$*\\"}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert trials.trial(5.0, "bucket", "gs://x") == "-m tpu.trials bucket gs://x"
    with pytest.raises(Fault, match="no answer within 1 s"):
        trials.trial(0.6, "start")


def test_a_container_has_what_it_was_given(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", str(limit))
    whole = doctor.memory_bytes()
    limit.write_text(f"{2**30}\n")
    assert doctor.memory_bytes() == 2**30 < whole
    with pytest.raises(Fault, match=r"expected 2 GiB of memory. Received: 1.0 GiB"):
        doctor.Doctor().memory()
