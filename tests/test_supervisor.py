"""tpu.cloud supervise: a run goes on through all that can happen to a slice, within its budget."""

# ruff: noqa: F811 (fixtures are arguments of the same name)

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.cloud_server import PARENT, TOKEN, cloud, fake_ssh  # noqa: F401
from tpu import cloud as program
from tpu import remote, supervisor
from tpu.supervisor_state import State, StateFile

SLICE = ["--accelerator_type=v3-8", "--version=tpu-vm-tf-2.19.0"]
NODE, QUEUED = f"{PARENT}/nodes/n1", f"{PARENT}/queuedResources/n1"
HOUR = 3600


class Supervision:
    """`tpu.cloud supervise n1` with an API and an ssh on this machine."""

    def __init__(self, cloud, fake_ssh, capsys):
        self.cloud, self.ssh, self._capsys = cloud, fake_ssh, capsys
        self.file = fake_ssh.folder / "state.json"
        self.output = ""

    def argv(self, command, *flags):
        place = ["--zone=us-central1-a", "--project=proj", f"--state_file={self.file}"]
        budget = (
            [] if any(flag.startswith("--budget_hours") for flag in flags) else ["--budget_hours=1"]
        )
        return ["supervise", "n1", *SLICE, *place, *budget, self.ssh.flag, *flags, "--", command]

    def __call__(self, command, *flags):
        """Returns the exit status."""
        status = program.main(self.argv(command, *flags))
        said = self._capsys.readouterr()
        self.output = said.out + said.err
        assert TOKEN not in self.output and "Traceback" not in self.output
        return status

    def state(self):
        return json.loads(self.file.read_text())


@pytest.fixture
def supervise(cloud, fake_ssh, capsys):
    """See `Supervision`."""
    return Supervision(cloud, fake_ssh, capsys)


def test_a_run_from_nothing_to_its_end(supervise):
    status = supervise(
        supervise.ssh.script(0), "--setup=echo made on $WORKER", "--price_per_chip_hour=2"
    )
    assert status == 0
    cloud, (set_up, run) = supervise.cloud, supervise.ssh.calls()
    assert set_up == (0, "echo made on $WORKER")
    assert run[0] == 0 and "train" in run[1]
    assert [(r.method, r.path) for r in cloud.requests if r.method != "GET"] == [
        ("POST", f"{PARENT}/nodes"),
        ("DELETE", NODE),
    ]
    assert not cloud.resources and not supervise.file.exists()
    assert "nothing of it exists. Used: 0.00 of 1.00 h, 0.00 in money" in supervise.output


def test_set_up_is_for_all_workers_of_a_slice_once_and_the_run_for_worker_0(supervise):
    supervise.cloud.add_node("n1", workers=4)
    assert supervise(supervise.ssh.script(75, 1, 0), "--setup=true") == 0
    calls = supervise.ssh.calls()
    assert sorted(worker for worker, command in calls if command == "true") == [0, 1, 2, 3]
    assert [worker for worker, command in calls if "train" in command] == [0, 0, 0]


@pytest.mark.parametrize("lost_with, queued", [(255, False), (75, True), (137, False)])
def test_a_slice_that_is_taken_away_is_made_anew_and_the_run_goes_on(supervise, lost_with, queued):
    cloud, ssh = supervise.cloud, supervise.ssh

    def state():
        if queued:
            return "SUSPENDED" if ssh.runs() == 1 and len(cloud.asked("POST")) == 1 else "ACTIVE"
        return "PREEMPTED" if ssh.runs() == 1 and len(cloud.asked("POST")) == 1 else "READY"

    cloud.states = Keeping({}, n1=state)
    flags = ["--spot", "--queued"] if queued else ["--spot"]
    assert supervise(ssh.script(lost_with, 0), "--setup=true", *flags) == 0
    made = cloud.asked("POST")
    assert len(made) == 2 and made[0].query == made[1].query
    labels = [json.dumps(request.body).partition('"tpu-creation": "')[2][:32] for request in made]
    assert len(set(labels)) == 2
    assert [r.path for r in cloud.asked("DELETE")] == [QUEUED if queued else NODE] * 2
    assert (ssh.runs(), [c for _, c in ssh.calls()].count("true")) == (2, 2)
    assert "recreation 1" in supervise.output


class Keeping(dict):
    """States that survive the deletion of their resource."""

    def __init__(self, states, **kept):
        super().__init__({**states, **kept})
        self._kept = kept

    def pop(self, key, *default):
        return self._kept[key] if key in self._kept else super().pop(key, *default)


def test_a_slice_that_vanishes_is_made_anew(supervise):
    cloud, ssh = supervise.cloud, supervise.ssh
    vanish = f"rm {ssh.folder}/there; {ssh.script(255, 0)}"
    (ssh.folder / "there").touch()
    answer = cloud.answer

    def answer_without(method, path, query, body):
        if method == "GET" and path == NODE and not (ssh.folder / "there").exists():
            cloud.resources.pop(NODE, None)
            (ssh.folder / "there").touch()
        return answer(method, path, query, body)

    cloud.answer = answer_without
    assert supervise(vanish) == 0
    assert len(cloud.asked("POST")) == 2 and ssh.runs() == 2


def test_recreations_have_a_limit(supervise):
    cloud = supervise.cloud
    cloud.states = Keeping({}, n1=lambda: "PREEMPTED" if supervise.ssh.runs() else "READY")
    assert supervise(supervise.ssh.script(255), "--max_recreations=0") == supervisor.GAVE_UP
    assert len(cloud.asked("POST")) == 1 and not cloud.resources
    cloud.states = Keeping({}, n1=lambda: "PREEMPTED")
    supervise.file.unlink()
    assert supervise(supervise.ssh.script(0), "--max_recreations=2") == supervisor.GAVE_UP
    assert len(cloud.asked("POST")) == 1 + 3


def test_quick_failures_in_a_row_have_a_limit_and_input_that_cannot_work_has_no_second_try(
    supervise,
):
    assert supervise(supervise.ssh.script(1)) == supervisor.GAVE_UP
    assert supervise.ssh.runs() == supervisor.MAX_QUICK_FAILURES
    assert not supervise.cloud.resources
    (supervise.ssh.folder / "runs").unlink()
    assert supervise(supervise.ssh.script(2)) == supervisor.BAD_INPUT
    assert supervise.ssh.runs() == 1 and not supervise.cloud.resources


def test_failures_that_come_late_are_no_row(supervise, monkeypatch):
    monkeypatch.setattr(supervisor, "QUICK_SECONDS", 0.0)
    assert supervise(supervise.ssh.script(*[1] * 6, 0)) == 0
    assert supervise.ssh.runs() == 7


def test_set_up_that_fails_is_tried_again_and_then_given_up(supervise):
    assert supervise(supervise.ssh.script(0), "--setup=exit 2") == supervisor.GAVE_UP
    assert supervise.ssh.runs() == 0 and not supervise.cloud.resources


def test_a_slice_of_someone_else_is_used_and_not_deleted(supervise):
    cloud = supervise.cloud
    cloud.add_node("n1")
    assert supervise(supervise.ssh.script(0)) == 0
    assert NODE in cloud.resources and not cloud.asked("DELETE")
    assert "still there, and costs money" in supervise.output
    cloud.states["n1"] = lambda: "PREEMPTED"
    assert supervise(supervise.ssh.script(0)) == supervisor.FAILED
    assert NODE in cloud.resources and not cloud.asked("DELETE") and not cloud.asked("POST")
    assert "was not made by this supervisor. Remedy: --adopt" in supervise.output


def test_a_slice_that_was_stopped_is_not_started(supervise):
    supervise.cloud.add_node("n1", "STOPPED")
    assert supervise(supervise.ssh.script(0)) == supervisor.FAILED
    assert "was stopped by someone" in supervise.output and supervise.ssh.runs() == 0
    assert NODE in supervise.cloud.resources


def test_a_creation_that_fails_for_want_of_chips_is_tried_again(supervise):
    cloud = supervise.cloud
    answer = cloud.answer

    def answer_scarcely(method, path, query, body):
        if method == "POST" and len(cloud.asked("POST")) < 3:
            metadata = {"target": NODE, "verb": "create", "createTime": "2026"}
            cloud.operations = [{"metadata": metadata, "error": {"message": "no more capacity"}}]
            return 200, {"name": "operation"}
        return answer(method, path, query, body)

    cloud.answer = answer_scarcely
    assert supervise(supervise.ssh.script(0)) == 0
    assert len(cloud.asked("POST")) == 3
    assert supervise.output.count("no more capacity. ") == 2


def test_an_adopted_slice_is_made_anew(supervise):
    supervise.cloud.add_node("n1", "PREEMPTED")
    assert supervise(supervise.ssh.script(0), "--adopt") == 0
    assert len(supervise.cloud.asked("DELETE")) == 2 and len(supervise.cloud.asked("POST")) == 1


def test_a_slice_is_kept_where_that_is_asked_for(supervise):
    assert supervise(supervise.ssh.script(0), "--keep") == 0
    assert NODE in supervise.cloud.resources
    assert "python -m tpu.cloud delete n1 --zone=us-central1-a --project=proj" in supervise.output
    assert supervise(supervise.ssh.script(0)) == 0  # it knows its own
    assert len(supervise.cloud.asked("POST")) == 1 and not supervise.cloud.resources


class Killed(BaseException):
    pass


def test_a_supervisor_that_was_killed_after_its_request_knows_its_slice(supervise, monkeypatch):
    create = supervisor.cloud_resources.create

    def create_and_die(*arguments):
        create(*arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(supervisor.cloud_resources, "create", create_and_die)
        with pytest.raises(Killed):
            supervise(supervise.ssh.script(0))
    assert supervise(supervise.ssh.script(0)) == 0
    assert len(supervise.cloud.asked("POST")) == 1 and not supervise.cloud.resources


def test_a_supervisor_that_was_killed_takes_its_slice_over(supervise, monkeypatch):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(remote.Shell, "start", die)
        with pytest.raises(Killed):
            supervise(supervise.ssh.script(0))
    state = supervise.state()
    assert state["creation"] == supervise.cloud.resources[NODE]["labels"]["tpu-creation"]
    supervise.file.write_text(json.dumps({**state, "since": state["since"] - HOUR / 2}))
    assert supervise(supervise.ssh.script(0)) == 0
    assert len(supervise.cloud.asked("POST")) == 1 and not supervise.cloud.resources
    assert "Used: 0.50 of 1.00 h" in supervise.output


def test_a_supervisor_that_was_killed_before_its_request_came_out_asks_anew(supervise):
    StateFile(str(supervise.file)).write(State("n1", "us-central1-a", "proj", creation="a" * 32))
    assert supervise(supervise.ssh.script(0)) == 0
    assert len(supervise.cloud.asked("POST")) == 1


def test_a_slice_that_came_while_no_supervisor_looked_counts_from_its_creation(supervise):
    StateFile(str(supervise.file)).write(State("n1", "us-central1-a", "proj", creation="a" * 32))
    half_an_hour_ago = time.gmtime(time.time() - HOUR / 2)
    supervise.cloud.add_node(
        "n1",
        labels={"tpu-creation": "a" * 32},
        createTime=time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", half_an_hour_ago),
    )
    assert supervise(supervise.ssh.script(0)) == 0
    assert "Used: 0.50 of 1.00 h" in supervise.output
    assert not supervise.cloud.asked("POST") and not supervise.cloud.resources


def test_the_budget_ends_a_run_which_may_save_first(supervise):
    ready, saved = supervise.ssh.folder / "ready", supervise.ssh.folder / "saved"
    command = (
        f"trap 'echo yes > {saved}; exit 75' TERM; touch {ready}; while :; do sleep 0.05; done"
    )
    status = supervise(command, f"--budget_hours={3 / HOUR}", "--price_per_chip_hour=1")
    assert status == supervisor.BUDGET_USED_UP
    assert ready.exists() and saved.exists()
    assert not supervise.cloud.resources
    assert "the budget is used up" in supervise.output


def test_the_budget_ends_a_set_up_too_and_holds_over_restarts(supervise):
    assert (
        supervise("true", "--setup=exec sleep 60", f"--budget_hours={1.5 / HOUR}")
        == supervisor.BUDGET_USED_UP
    )
    assert not supervise.cloud.resources
    assert supervise("true", f"--budget_hours={1.5 / HOUR}") == supervisor.BUDGET_USED_UP
    assert len(supervise.cloud.asked("POST")) == 1
    assert supervise("true") == 0


def test_the_budget_ends_the_wait_for_a_slice_under_repair(supervise):
    supervise.cloud.states["n1"] = lambda: "REPAIRING" if supervise.ssh.runs() else "READY"
    assert (
        supervise(supervise.ssh.script(255), f"--budget_hours={2 / HOUR}")
        == supervisor.BUDGET_USED_UP
    )
    assert not supervise.cloud.resources


def test_a_budget_in_money_limits_the_hours(supervise, capsys):
    money = ["--budget_hours=9", "--budget_money=4", "--price_per_chip_hour=0.5"]
    assert supervise(supervise.ssh.script(0), *money) == 0
    assert "of 2.00 h" in supervise.output  # a v3-8 has 4 chips
    for flags, said in (
        (["--budget_money=4"], "expected --price_per_chip_hour beside it"),
        (["--price_per_chip_hour=1", "--accelerator_type=v99-8"], "of which the chips are known"),
    ):
        assert supervise("true", *flags) == 2
        assert said in supervise.output


def test_a_refused_request_ends_it_with_nothing_left(supervise):
    supervise.cloud.fail("POST", "nodes", 403, {"error": {"message": "denied"}}, times=9)
    assert supervise(supervise.ssh.script(0)) == supervisor.FAILED
    assert "roles/tpu.admin" in supervise.output and "nothing of it exists" in supervise.output


def test_troubles_of_the_api_do_not_end_a_run(supervise):
    cloud = supervise.cloud
    cloud.fail("POST", "nodes", 429, "", {"Retry-After": "0.01"}, times=2)
    cloud.fail("GET", "nodes", 500, "", times=2)
    cloud.fail("GET", "nodes", 200, "garbage", times=2)
    cloud.fail("DELETE", "nodes", 503, "", times=2)
    assert supervise(supervise.ssh.script(1, 0)) == 0
    assert supervise.ssh.runs() == 2 and not cloud.resources


def test_a_missing_ssh_is_told_before_anything_is_paid_for(supervise, capsys):
    assert supervise("true", "--ssh_command=no-such-program {worker} {command}") == 1
    assert "no-such-program" in supervise.output and not supervise.cloud.requests


@pytest.mark.parametrize(
    "content, said",
    [
        ("garbage", "expected the state of a supervisor"),
        ('{"name": "n1"}', "expected the state of a supervisor"),
        ('{"name": "n2", "zone": "z", "project": "p"}', "Received: that of n2 z p"),
    ],
)
def test_a_state_that_is_not_its_own_is_refused(supervise, content, said):
    supervise.file.write_text(content)
    assert supervise("true") == 1
    assert said in supervise.output and not supervise.cloud.requests


def test_a_second_supervisor_is_kept_out(supervise):
    with StateFile(str(supervise.file)).locked():
        assert supervise("true") == 1
    assert "expected no other supervisor at work" in supervise.output


def test_a_state_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    file = StateFile(str(tmp_path / "state"))
    file.write(State("n1", "z", "p", creation="old"))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RuntimeError, match="No space left"):
        file.write(State("n1", "z", "p", creation="new"))
    assert file.read("n1", "z", "p").creation == "old"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_supervisor_says_what_still_costs_money(supervise, number):
    def interrupt():
        while not supervise.ssh.runs():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert supervise(f"{supervise.ssh.script(0)}; sleep 30") == 128 + number
    assert NODE in supervise.cloud.resources
    assert "n1 still exists or is coming, costs money" in supervise.output
    assert "python -m tpu.cloud delete n1 --zone=us-central1-a --project=proj" in supervise.output
    subprocess.run(["sh", "-c", remote.stop("n1", 1)])  # what it left at work


def test_a_session_is_forgotten_when_it_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SESSION_FOLDER", str(tmp_path))
    command = remote.session(
        "n1",
        f"ls {tmp_path} > {tmp_path}/during; exit_status() {{ return 3; }}; exit_status # end",
        5,
    )
    assert subprocess.run(["sh", "-c", command]).returncode == 3
    assert "tpu-run-n1-" in (tmp_path / "during").read_text()
    assert not list(tmp_path.glob("tpu-run-*"))


def test_a_session_stops_what_an_earlier_one_left_and_has_its_commands_status(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "SESSION_FOLDER", str(tmp_path))
    trap = f"trap 'echo saved >> {tmp_path}/log; exit 75' TERM; touch {tmp_path}/up; "
    loop = trap + "while :; do sleep 0.05; done"
    first = subprocess.Popen(["sh", "-c", remote.session("n1", loop, 5)])
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    second = subprocess.run(["sh", "-c", remote.session("n1", "exit 7", 5)])
    assert (first.wait(10), second.returncode) == (75, 7)
    assert (tmp_path / "log").read_text() == "saved\n"
    assert not list(tmp_path.glob("tpu-run-*"))


def test_a_second_process_can_supervise_what_the_first_one_began(supervise):
    """The real thing: the program is killed as a process, and started again."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    supervise.cloud.states["n1"] = ["READY"]
    command = f"{supervise.ssh.script(0)}; sleep 30"
    code = (
        "import sys; from tpu import cloud, remote; remote.SESSION_FOLDER = sys.argv[1]; "
        "sys.exit(cloud.main(sys.argv[2:]))"
    )
    argv = [sys.executable, "-c", code, remote.SESSION_FOLDER, *supervise.argv(command)]
    first = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)
    while not supervise.ssh.runs():
        time.sleep(0.02)
        assert first.poll() is None
    first.kill()
    first.wait()
    assert supervise(supervise.ssh.script(0)) == 0
    assert len(supervise.cloud.asked("POST")) == 1 and not supervise.cloud.resources
