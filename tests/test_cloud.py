"""tpu.cloud against an API and an ssh on this machine: requests, states, troubles, secrets."""

# ruff: noqa: F811 (fixtures are arguments of the same name)

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.cloud_server import PARENT, TOKEN, cloud, fake_ssh  # noqa: F401
from tpu import cloud as program
from tpu import cloud_api, remote
from tpu.cloud_errors import CloudError, without_secrets

PLACE = ["--zone=us-central1-a", "--project=proj"]
SLICE = ["--accelerator_type=v3-8", "--version=tpu-vm-tf-2.19.0-pjrt"]
NODE, QUEUED = f"{PARENT}/nodes/n1", f"{PARENT}/queuedResources/n1"


def call(capsys, *argv):
    """Returns exit status, standard output and standard error."""
    argv, command = (
        (argv[: argv.index("--")], argv[argv.index("--") :]) if "--" in argv else (argv, ())
    )
    try:
        status = program.main([*argv, *PLACE, *command])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert "Traceback" not in said.err
    return status, said.out, said.err


def one_error(status, error):
    assert status != 0
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert error.rstrip().endswith(line)
    return line


def test_a_slice_from_creation_to_deletion(cloud, capsys):
    assert call(capsys, "create", "n1", *SLICE, "--spot")[0] == 0
    (request,) = cloud.asked("POST")
    assert (request.path, request.query["nodeId"]) == (f"{PARENT}/nodes", "n1")
    assert request.body["acceleratorType"] == "v3-8"
    assert request.body["runtimeVersion"] == "tpu-vm-tf-2.19.0-pjrt"
    assert request.body["schedulingConfig"] == {"spot": True}
    assert request.body["labels"]["created-by"] == "lamb-tf"

    status, out, _ = call(capsys, "wait", "n1")
    assert status == 0
    assert "TPU VM CREATING\nn1: TPU VM READY\n" in out
    status, out, _ = call(capsys, "list")
    assert status == 0
    assert out.count("\n") == 1 and "n1  us-central1-a  TPU VM READY  v3-8" in out and "spot" in out
    status, out, _ = call(capsys, "describe", "n1")
    assert json.loads(out)["tpu_vm"]["name"] == NODE
    assert call(capsys, "delete", "n1")[0] == 0
    assert not cloud.resources


def test_a_queued_resource_waits_in_line_and_is_deleted_with_its_tpu_vm(cloud, capsys):
    assert call(capsys, "create", "n1", *SLICE, "--spot", "--queued", "--labels=team=a")[0] == 0
    (request,) = cloud.asked("POST")
    assert (request.path, request.query["queuedResourceId"]) == (f"{PARENT}/queuedResources", "n1")
    (spec,) = request.body["tpu"]["nodeSpec"]
    assert (spec["parent"], spec["nodeId"], request.body["spot"]) == (PARENT, "n1", {})
    assert spec["node"]["labels"]["team"] == "a" and "schedulingConfig" not in spec["node"]

    status, out, _ = call(capsys, "wait", "n1")
    states = [line.partition(": ")[2] for line in out.splitlines()]
    assert status == 0
    assert states[:2] == ["queued resource WAITING_FOR_RESOURCES", "queued resource PROVISIONING"]
    assert states[-2:] == ["queued resource ACTIVE, TPU VM READY", "ready, 1 worker"]
    assert call(capsys, "delete", "n1")[0] == 0
    assert [r.path for r in cloud.asked("DELETE")] == [QUEUED]
    assert not cloud.resources


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "STOPPED"])
def test_waiting_ends_where_nothing_comes(cloud, capsys, state):
    cloud.add_node("n1", "CREATING", state)
    status, _, error = call(capsys, "wait", "n1")
    assert f"Received: TPU VM {state}" in one_error(status, error)


def test_waiting_ends_at_its_time_and_where_the_queue_gives_up(cloud, capsys):
    cloud.add_node("n1", "CREATING")
    status, _, error = call(capsys, "wait", "n1", "--timeout=0.1")
    assert "within 0 s. Received: TPU VM CREATING" in one_error(status, error)
    cloud.states["n2"] = ["FAILED"]
    failed = {"failedData": {"error": {"message": "no quota"}}}
    cloud.resources[f"{PARENT}/queuedResources/n2"] = {"tpu": {"nodeSpec": []}}
    shown = cloud._shown
    cloud._shown = lambda path: {**shown(path), "state": {"state": "FAILED", **failed}}
    status, _, error = call(capsys, "wait", "n2")
    assert "FAILED (no quota)" in one_error(status, error)


def test_the_reason_of_a_creation_that_failed_is_found(cloud, capsys):
    metadata = {"target": NODE, "verb": "create", "createTime": "2026-01-02"}
    error = {"code": 8, "message": "There is no more capacity in the zone"}
    cloud.operations = [
        {"metadata": {**metadata, "createTime": "2026-01-01"}, "error": {"message": "older"}},
        {"metadata": metadata, "error": error},
        {"metadata": {**metadata, "target": f"{PARENT}/nodes/other"}, "error": {"message": "no"}},
    ]
    status, _, error = call(capsys, "wait", "n1")
    assert "its creation failed: There is no more capacity" in one_error(status, error)


TROUBLES = [
    ((429, {"error": {"message": "slow down"}}, {"Retry-After": "0.02"}), "429 slow down"),
    ((500, "<html>oops</html>"), "500 Internal Server Error"),
    ((503, {"error": {"message": "busy"}}), "503 busy"),
    (
        (403, {"error": {"message": "rate", "errors": [{"reason": "rateLimitExceeded"}]}}),
        "403 rate",
    ),
    ((200, "not JSON {"), "the answer is not JSON"),
    ((200, "[1]"), "the answer is not a JSON object"),
    ((None, ""), "no connection"),
]


@pytest.mark.parametrize("answer, said", TROUBLES, ids=[said for _, said in TROUBLES])
def test_a_passing_trouble_is_tried_again_and_a_lasting_one_given_up_in_time(
    cloud, capsys, answer, said
):
    cloud.add_node("n1")
    cloud.fail("GET", "nodes/n1", *answer, times=3)
    status, _, error = call(capsys, "describe", "n1")
    assert status == 0
    assert len(cloud.asked("GET", "nodes/n1")) >= 4
    assert error.count(said) == (3 if answer[0] else 1)  # httplib2 itself connects anew
    cloud.fail("GET", "nodes/n1", *answer, times=1000)
    status, _, error = call(capsys, "describe", "n1", "--timeout=0.2")
    line = one_error(status, error)
    assert said in line and "tries within 0 s" in line and "longer --timeout" in line


def test_pauses_grow_and_respect_what_the_server_asks_for(cloud, capsys, monkeypatch):
    pauses = []
    monkeypatch.setattr(cloud_api.time, "sleep", pauses.append)
    cloud.add_node("n1")
    cloud.fail("GET", "nodes/n1", 500, "", times=3)
    cloud.fail("GET", "nodes/n1", 429, "", {"Retry-After": "7"})
    assert call(capsys, "describe", "n1")[0] == 0
    assert pauses == [0.01, 0.02, 0.04, 7.0]
    cloud.fail("GET", "nodes/n1", 429, "", {"Retry-After": "3600"})
    status, _, error = call(capsys, "describe", "n1")
    assert "in 1 tries within 60 s: 429" in error and "asks for 3600 s" in one_error(status, error)


def test_slow_answers_are_waited_for_and_then_asked_for_again(cloud, capsys, monkeypatch):
    cloud.add_node("n1")
    cloud.fail("GET", "nodes/n1", 200, {"state": "READY"}, {}, 0.1)
    assert call(capsys, "describe", "n1")[0] == 0
    assert len(cloud.asked("GET", "nodes/n1")) == 1
    monkeypatch.setattr(cloud_api, "ANSWER_SECONDS", 0.2)
    cloud.fail("GET", "nodes/n1", 200, {"state": "LATE"}, {}, 0.6)
    status, out, error = call(capsys, "describe", "n1")
    assert status == 0 and "LATE" not in out
    assert "no answer within 0 s" in error


def test_a_refused_connection_is_given_up_in_time(cloud, capsys, monkeypatch):
    monkeypatch.setenv("TPU_API_DISCOVERY_URL", "http://127.0.0.1:1/discovery")
    status, _, error = call(capsys, "list", "--timeout=0.1")
    assert "ConnectionRefusedError" in one_error(status, error)


@pytest.mark.parametrize(
    "answer, remedy",
    [
        ((401, {"error": {"message": "bad token"}}), "gcloud auth application-default login"),
        ((403, {"error": {"message": "denied"}}), "roles/tpu.admin"),
        (
            (403, {"error": {"message": "off", "details": [{"reason": "SERVICE_DISABLED"}]}}),
            "gcloud services enable tpu.googleapis.com --project=proj",
        ),
        ((404, {"error": {"message": "no zone"}}), "check the name, --zone=us-central1-a"),
        ((400, {"error": {"message": "bad type"}}), "mend what the answer names"),
        ((302, "", {"Location": "http://127.0.0.1:1/"}), "check TPU_API_DISCOVERY_URL"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_refusal_is_told_at_once_with_the_remedy(cloud, capsys, answer, remedy):
    cloud.fail("POST", "nodes", *answer, times=99)
    status, _, error = call(capsys, "create", "n1", *SLICE)
    assert remedy in one_error(status, error)
    assert len(cloud.asked("POST")) == 1


def test_a_name_that_is_taken_is_refused_and_a_creation_whose_answer_was_lost_is_not(cloud, capsys):
    cloud.add_node("n1")
    status, _, error = call(capsys, "create", "n1", *SLICE)
    assert "409" in one_error(status, error)
    created = cloud.answer

    def lose_the_answer(method, *request):
        answer = created(method, *request)
        return (503, "") if method == "POST" and answer[0] == 200 else answer

    cloud.answer = lose_the_answer
    assert call(capsys, "create", "n2", *SLICE)[0] == 0
    assert len(cloud.asked("POST")) == 3 and f"{PARENT}/nodes/n2" in cloud.resources


@pytest.mark.parametrize("command", ["wait", "describe", "delete", "run"])
def test_what_is_not_there_is_told_at_once(cloud, capsys, fake_ssh, command):
    more = [fake_ssh.flag, "--", "true"] if command == "run" else []
    status, _, error = call(capsys, command, "n9", *more)
    assert "Received: none" in one_error(status, error)


def test_only_what_was_named_is_deleted(cloud, capsys):
    cloud.add_node("n1")
    cloud.add_node("n2", queuedResource=f"{PARENT}/queuedResources/big")
    status, _, error = call(capsys, "delete", "n2")
    assert "delete big, which deletes all its TPU VMs" in one_error(status, error)
    assert call(capsys, "delete", "n1")[0] == 0
    assert [r.path for r in cloud.asked("DELETE")] == [NODE]


def test_lists_have_all_pages(cloud, capsys):
    for number in range(5):
        cloud.add_node(f"n{number}")
    status, out, _ = call(capsys, "list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [f"n{i}" for i in range(5)]
    cloud.resources.clear()
    assert "no TPU VM and no queued resource" in call(capsys, "list")[1]


@pytest.mark.parametrize(
    "argv",
    [
        ["create", "n1", *SLICE, "--metadata=password=hunter2"],
        ["wait", "n1"],
        ["list"],
        ["describe", "n1"],
        ["delete", "n1"],
        ["run", "n1", "--", "echo", "a b"],
        ["supervise", "n1", *SLICE, "--budget_hours=1", "--setup=make", "--", "train"],
    ],
    ids=lambda argv: argv[0],
)
def test_dry_run_shows_the_requests_and_sends_none(cloud, capsys, monkeypatch, argv):
    monkeypatch.delenv("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    status, out, error = call(capsys, argv[0], "--dry_run", *argv[1:])
    assert (status, error, cloud.requests) == (0, "", [])
    assert "https://tpu.googleapis.com/v2/projects/proj/locations/us-central1-a/" in out
    assert "hunter2" not in out
    if argv[0] == "create":
        assert (
            out.startswith("POST ")
            and json.loads(out[out.index("{") :])["acceleratorType"] == "v3-8"
        )
    if argv[0] == "run":
        assert "--worker=WORKER --quiet '--command=echo '\"'\"'a b'\"'\"''" in out


def test_no_credential_appears_whatever_the_server_says(cloud, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": "you sent $AUTHORIZATION and ya29.another-one"}}
    for status in (400, 403, 404, 429):
        cloud.fail("GET", "nodes", status, echo, times=1)
        assert "another-one" not in "".join(
            map(str, call(capsys, "describe", "n1", "--timeout=0.1"))
        )
    cloud.add_node(
        "n1", description="$AUTHORIZATION", metadata={"startup-script": "export PW=hunter2"}
    )
    status, out, _ = call(capsys, "describe", "n1")  # `call` looks for the token
    assert status == 0 and "hunter2" not in out and "[credential]" in out
    cloud.fail("DELETE", "nodes", 200, {"error": {"message": "$AUTHORIZATION"}}, times=1)
    status, _, error = call(capsys, "delete", "n1")
    assert "[credential]" in one_error(status, error)
    api = cloud_api.Api("proj", "us-central1-a")
    api.call("nodes", "get", name=NODE)
    assert TOKEN not in repr(vars(api)) + repr(vars(api)["_credentials"]) + caplog.text


def test_texts_lose_what_looks_like_a_credential():
    for secret in (
        "ya29.a0Ab-c_D",
        "1//0abcdefghijklmnopqrstuvwx",
        "Bearer abc.def",
        "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----",
    ):
        assert without_secrets(f"before {secret} after") == "before [credential] after"
    assert without_secrets('{"refresh_token": "abc"}') == '{"refresh_token": "[credential]"}'
    assert without_secrets("an opaque one", "opaque") == "an [credential] one"


def test_missing_and_unusable_credentials_are_told_apart_from_an_api_in_trouble(
    cloud, capsys, monkeypatch, tmp_path
):
    monkeypatch.delenv("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    (tmp_path / "key.json").write_text('{"private_key": "hunter2"')
    for file in ("/nowhere/key.json", str(tmp_path / "key.json")):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", file)
        status, _, error = call(capsys, "list")
        assert f"Received: {file} (GOOGLE_APPLICATION_CREDENTIALS)" in one_error(status, error)
        assert "gcloud auth application-default login" in error and "hunter2" not in error


def test_a_service_account_signs_in_and_its_refusal_and_an_outage_are_told_apart(
    cloud, capsys, monkeypatch, tmp_path
):
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {"type": "service_account", "client_email": "a@b", "private_key": key.decode()}
    (tmp_path / "key.json").write_text(
        json.dumps({**account, "token_uri": f"{cloud.address}/token"})
    )
    monkeypatch.delenv("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    cloud.add_node("n1")
    cloud.fail("POST", "token", 200, {"access_token": TOKEN, "expires_in": 3600})
    assert call(capsys, "describe", "n1")[0] == 0
    cloud.fail("POST", "token", 400, {"error": "invalid_grant", "error_description": TOKEN})
    status, _, error = call(capsys, "describe", "n1")
    line = one_error(status, error)
    assert "(RefreshError)" in line and "application-default login" in line
    (tmp_path / "key.json").write_text(json.dumps({**account, "token_uri": "http://127.0.0.1:1/"}))
    status, _, error = call(capsys, "describe", "n1", "--timeout=0.1")
    assert "no connection" in one_error(status, error)


@pytest.mark.parametrize(
    "content", ["garbage", "{}", '{"rootUrl": "http://10.0.0.1/", "servicePath": ""}']
)
def test_a_wrong_description_of_the_api_is_refused(cloud, capsys, monkeypatch, content):
    cloud.fail("GET", "elsewhere", 200, content)
    monkeypatch.setenv("TPU_API_DISCOVERY_URL", f"{cloud.address}/elsewhere?key=secret-key")
    status, _, error = call(capsys, "list")
    line = one_error(status, error)
    assert (
        "TPU_API_DISCOVERY_URL" in line and "Remedy: unset it" in line and "secret-key" not in line
    )


def test_credentials_do_not_cross_a_network_in_the_clear(monkeypatch):
    monkeypatch.setattr(cloud_api, "_description", lambda: {"rootUrl": "http://10.0.0.1/"})
    with pytest.raises(CloudError, match="expected an API on https"):
        cloud_api.Api("p", "z").call("nodes", "get", name=NODE)


def test_where_the_client_is_missing_one_line_says_what_to_install(capsys, monkeypatch):
    found = cloud_api.cloud_credentials.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "googleapiclient" else found(name)
    )
    status, _, error = call(capsys, "list")
    assert "pip install -e '.[tpu]' -c constraints.txt" in one_error(status, error)


def test_output_and_exit_status_of_each_worker_come_back(cloud, capsys, fake_ssh):
    cloud.add_node("n1", workers=4)
    command = 'echo "hello from $WORKER"; exit $((WORKER % 3))'
    status, out, _ = call(capsys, "run", "n1", fake_ssh.flag, "--", command)
    assert status == 2
    for worker, ended in enumerate((0, 1, 2, 0)):
        assert f"[{worker}] hello from {worker}\n" in out
        assert f"worker {worker}: exit {ended}\n" in out
    assert "2 of 4 succeeded" in out
    status, out, _ = call(
        capsys, "run", "n1", "--workers=3,1", fake_ssh.flag, "--", "printf", "%s|", "a b"
    )
    assert (status, sorted(out.splitlines()[:2])) == (0, ["[1] a b|", "[3] a b|"])


def test_a_large_slice_is_reached_through_a_limited_number_of_connections(
    cloud, capsys, fake_ssh, monkeypatch
):
    monkeypatch.setattr(remote, "CONNECTIONS", 2)
    cloud.add_node("n1", workers=7)
    status, out, _ = call(capsys, "run", "n1", fake_ssh.flag, "--", "echo Bearer abc.def")
    assert status == 0 and "7 of 7 succeeded" in out
    assert out.count("] [credential]\n") == 7


@pytest.mark.parametrize("ended, said", [("exit 255", 255), ("kill -9 $$", 137)])
def test_a_broken_connection_has_a_status(cloud, capsys, fake_ssh, ended, said):
    status, out, _ = call(capsys, "run", "n1", "--workers=0", fake_ssh.flag, "--", ended)
    assert status == said and f"worker 0: exit {said}" in out


def test_a_slice_that_is_not_ready_is_not_run_on(cloud, capsys, fake_ssh):
    cloud.add_node("n1", "CREATING")
    status, _, error = call(capsys, "run", "n1", fake_ssh.flag, "--", "true")
    assert "expected a slice that is ready. Received: TPU VM CREATING" in one_error(status, error)
    assert not fake_ssh.calls()


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--ssh_command=ssh {command}", "expected {worker} and {command} in it"),
        ("--ssh_command=ssh {worker} {command} {host}", "and none but {name} {zone}"),
        ("--ssh_command=ssh '{worker} {command}", "expected a command line"),
        ("--ssh_command=no-such-program {worker} {command}", "Received: no-such-program"),
        ("--workers=0,x", "numbers with commas between them"),
        ("--workers=-1", "numbers with commas between them"),
        ("--workers=0,0-2", "numbers with commas between them"),
    ],
)
def test_a_wrong_way_to_the_workers_is_refused_in_a_line(cloud, capsys, flag, said):
    status, _, error = call(capsys, "run", "n1", flag, "--", "true")
    assert status == (1 if "no-such-program" in flag else 2)
    assert said in one_error(status, error)
    assert not cloud.requests


def test_names_in_a_template_stay_one_argument():
    shell = remote.Shell("n1", "z", "p", "ssh '{name}.{worker} x' {command}")
    assert shell.arguments(3, "a; b '{worker}' c") == ["ssh", "n1.3 x", "a; b '{worker}' c"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["create", "N1", *SLICE], "a name such as my-tpu-1"),
        (["create", "n1/../x", *SLICE], "a name such as my-tpu-1"),
        (["create", "n1", "--accelerator_type=v3-8"], "--version"),
        (["create", "n1", *SLICE, "--labels=a"], "KEY=VALUE"),
        (["create", "n1", *SLICE, "--labels=a=B!"], "value of a-z"),
        (["create", "n1", *SLICE, "--startup_script=/nowhere"], "a file of text"),
        (["wait", "n1", "--timeout=-1"], "a number above 0"),
        (["wait", "n1", "--", "true"], "expected no command behind --"),
        (["run", "n1"], "expected a command behind --"),
        (["run", "n1", "--", " "], "expected a command behind --"),
        (["supervise", "n1", *SLICE, "--", "train"], "--budget_hours"),
        (["supervise", "n1", *SLICE, "--budget_hours=nan", "--", "t"], "a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_refused_in_a_line(capsys, argv, said):
    status, _, error = call(capsys, *argv)
    assert status == 2
    assert said in one_error(status, error)


def test_a_pod_without_its_runtime_is_warned_of(cloud, capsys):
    flags = ["--accelerator_type=v3-32", "--version=tpu-vm-tf-2.19.0-pjrt"]
    status, _, error = call(capsys, "create", "n1", *flags)
    assert status == 0 and "expected one with -pod, for v3-32 has 4 hosts" in error


def test_an_interrupted_run_ends_its_connections(cloud, capsys, fake_ssh):
    def interrupt():
        while not fake_ssh.calls():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    status, _, error = call(
        capsys, "run", "n1", "--workers=0", fake_ssh.flag, "--", "exec sleep 60"
    )
    assert status == 128 + signal.SIGTERM
    assert "python -m tpu.cloud delete n1 --zone=us-central1-a --project=proj" in error


def test_the_program_needs_no_tensorflow():
    code = "import sys, tpu.cloud; sys.exit(any(m.startswith(('tensorflow', 'jax')) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
