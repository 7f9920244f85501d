"""What is said of a TPU that was given by name: against the API, played on this machine."""

import pytest

from tests.cloud_server import PARENT, TOKEN, cloud  # noqa: F401
from tpu import named_tpu, tpu_servers
from tpu.failures import Fault
from tpu.named_tpu import Node

PLACE = ("us-central1-a", "proj")
READY = Node("pod", "READY", "HEALTHY", "v3-32", "tpu-vm-tf-2.20.0-pod-pjrt", ("10.0.0.1:8470",))


@pytest.fixture(autouse=True)
def nobodys_machine(monkeypatch):
    """No credentials but those of a test, not on Google's cloud, little patience."""
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GCE_METADATA_HOST", "TPU_API_DISCOVERY_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    monkeypatch.setattr(named_tpu, "LOOK_UP_SECONDS", 0.5)


def refusal(*arguments):
    with pytest.raises(Fault) as raised:
        named_tpu.find(*arguments)
    assert "\n" not in str(raised.value)
    assert TOKEN not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["Local", "127.0.0.1:8470", "a/b", "tpu "])
def test_what_is_no_name_is_not_looked_for(name):
    assert "or addresses such as grpc://10.0.0.2:8470" in refusal(name, *PLACE)


def test_a_tpu_is_found_with_all_of_its_workers(cloud):  # noqa: F811
    more = {"acceleratorType": "v3-32", "runtimeVersion": "tpu-vm-tf-2.20.0-pod-pjrt"}
    cloud.add_node("pod", "READY", workers=4, health="HEALTHY", **more)
    node = named_tpu.find("pod", *PLACE)
    assert (node.state, node.health, node.accelerator_type) == ("READY", "HEALTHY", "v3-32")
    assert node.url == ",".join(f"grpc://10.0.0.{i}:8470" for i in range(4))
    assert named_tpu.node_fault(node, "2.20.0") is None


def test_no_place(monkeypatch):
    text = refusal("pod")
    assert "expected --tpu_zone and --gcp_project" in text
    assert "expected --gcp_project on" in refusal("pod", "us-central1-a")


def test_no_credentials(monkeypatch):
    text = refusal("pod", *PLACE)
    assert text.startswith("no credentials: ")
    assert "gcloud auth application-default login" in text


def test_credentials_that_lead_nowhere_come_first(monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    assert "Received: /nowhere/key.json" in refusal("pod")


def test_a_wrong_name_is_told_with_the_names_that_are_there(cloud):  # noqa: F811
    there = {"nodes": [{"name": f"{PARENT}/nodes/{name}"} for name in ("other", "pod-2")]}
    cloud.fail("GET", "locations/-/nodes", 200, there)
    text = refusal("pod", *PLACE)
    assert text.startswith("wrong name: no TPU of this name in us-central1-a of proj")
    assert "There: other, pod-2." in text


def test_a_wrong_zone_is_told_with_the_right_one(cloud):  # noqa: F811
    elsewhere = {"nodes": [{"name": "projects/proj/locations/europe-west4-a/nodes/pod"}]}
    cloud.fail("GET", "locations/-/nodes", 200, elsewhere)
    text = refusal("pod", *PLACE)
    assert text.startswith("wrong zone: ")
    assert text.endswith("Remedy: --tpu_zone=europe-west4-a")


def test_a_name_that_is_not_there_although_zones_cannot_be_listed(cloud):  # noqa: F811
    cloud.fail("GET", "locations/-/nodes", 403, {"error": {"message": "no"}})
    assert refusal("pod", *PLACE).startswith("wrong name: ")


UNKNOWN_ZONE = "Location us-central1-a is not found or access is unauthorized."
ANSWERS = {
    "unknown zone": (403, UNKNOWN_ZONE, ["wrong zone: us-central1-a", "--tpu_zone="]),
    "no right": (
        403,
        "Permission tpu.nodes.get denied",
        ["403", "--gcp_project=proj", "roles/tpu"],
    ),
    "bad credentials": (
        401,
        "Invalid credentials",
        ["no credentials", "application-default login"],
    ),
    "out of order": (500, "Internal error", ["no success in", "500"]),
    "too many": (429, "Quota exceeded", ["no success in", "429"]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_answer_of_the_api_has_its_words(cloud, name, capsys):  # noqa: F811
    status, message, words = ANSWERS[name]
    cloud.fail("GET", "nodes/pod", status, {"error": {"message": message}}, times=1000)
    text = refusal("pod", *PLACE)
    assert all(word in text for word in words), text
    assert TOKEN not in "".join(capsys.readouterr())


def test_an_api_that_does_not_answer_is_given_up(cloud):  # noqa: F811
    cloud.fail("GET", "nodes/pod", 200, {}, {}, 3.0, times=1000)
    assert "no answer within" in refusal("pod", *PLACE)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"state": "PREEMPTED"}, ["taken away", "tpu.cloud delete pod", "supervise"]),
        ({"state": "CREATING"}, ["READY. Received: CREATING", "tpu.cloud wait pod"]),
        ({"state": ""}, ["Received: no state"]),
        ({"health": "UNHEALTHY_TENSORFLOW"}, ["not healthy: UNHEALTHY_TENSORFLOW"]),
        ({"addresses": ()}, ["no address"]),
        (
            {"runtime_version": "tpu-vm-tf-2.18.0-pod-pjrt"},
            ["2.20.0", "Received: tpu-vm-tf-2.18.0"],
        ),
        ({"runtime_version": "2.9.1"}, ["Received: 2.9.1", "TensorFlow 2.9 here"]),
    ],
)
def test_a_tpu_on_which_nothing_can_start(changed, words):
    node = Node(**{**vars(READY), **changed})
    fault = named_tpu.node_fault(node, "2.20.0")
    assert all(word in str(fault) for word in words), fault


@pytest.mark.parametrize(
    "runtime", ["2.20.1", "tpu-ubuntu2204-base", "v2-alpha-tpuv5-lite", "nightly"]
)
def test_only_versions_that_are_known_to_differ_are_refused(runtime):
    assert tpu_servers.version_fault(runtime, "2.20.0") is None
    assert tpu_servers.version_fault(runtime, "") is None
