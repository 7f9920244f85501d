"""Worker processes: their results, their errors, their deaths and the death of their parent."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from pretraining import worker_pool
from pretraining.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
WORK = "tests.test_worker_pool:work"


def work(settings, task):
    """What the workers of these tests do, as the task says."""
    kind, value = task
    if kind == "refuse":
        raise InputError(f"--flag={value}: expected another value")
    if kind == "fail":
        raise KeyError(f"two\nlines {value}")
    if kind == "exit":
        os._exit(value)
    if kind == "kill":
        os.kill(os.getpid(), value)
    if kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if kind == "sleep":
        pathlib.Path(value).write_text(str(os.getpid()))
        time.sleep(60)
    return settings, value, os.getpid()


def tasks(*values):
    return [(f"task {i}", value) for i, value in enumerate(values)]


def ended(pid):
    """Whether a process is gone, or waits for its parent to take notice."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_task_is_done_by_one_of_the_workers():
    with worker_pool.WorkerPool(3, WORK) as pool:
        found = dict(pool.run("first", tasks(*(("give", i) for i in range(40)))))
        assert {name: value for name, (_, value, _) in found.items()} == {
            f"task {i}": i for i in range(40)
        }
        assert {pid for _, _, pid in found.values()} <= set(pool.pids)
        assert {settings for settings, _, _ in found.values()} == {"first"}
        again = dict(pool.run("second", tasks(("give", 1))))
        assert next(iter(again.values()))[0] == "second"
        pids = pool.pids
    assert all(map(ended, pids))


def test_no_task_is_made_before_a_worker_is_free():
    made = []

    def lazily():
        for i in range(20):
            made.append(i)
            yield f"task {i}", ("give", i)

    with worker_pool.WorkerPool(2, WORK) as pool:
        for done, _ in enumerate(pool.run(None, lazily()), 1):
            assert len(made) <= done + 2


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (("refuse", 7), r"^--flag=7: expected another value$"),
        (("fail", 7), r"^task 0: KeyError: .*two.*lines 7.*\(test_worker_pool.py, line \d+\)"),
        (("exit", 3), r"^worker 1 of 1, process PID, ended with exit code 3 while it .* task 0\."),
        (
            ("kill", signal.SIGKILL),
            r"^worker 1 of 1, process PID, was killed by SIGKILL .*task 0\.",
        ),
        (
            ("kill", signal.SIGSEGV),
            r"^worker 1 of 1, process PID, was killed by SIGSEGV .*task 0\.",
        ),
    ],
)
def test_an_error_or_a_death_is_one_line_with_the_task(task, said):
    with worker_pool.WorkerPool(1, WORK) as pool:
        with pytest.raises(InputError, match=said.replace("PID", str(pool.pids[0]))) as raised:
            list(pool.run(None, tasks(task)))
        assert "\n" not in str(raised.value)
        if task[0] != "refuse":
            assert "repeat the command" in str(raised.value)


def test_a_worker_that_dies_idle_is_missed(tmp_path):
    mark = tmp_path / "mark"

    def one_task_only():
        yield "task 0", ("sleep", str(mark))

    with worker_pool.WorkerPool(2, WORK) as pool:
        results = pool.run(None, _then_kill(one_task_only(), pool, mark))
        with pytest.raises(InputError, match=r"worker \d of 2, process \d+, was killed by SIGKILL"):
            list(results)


def _then_kill(some, pool, mark):
    """After the last task is handed out and begun, kills the worker that has none."""
    yield from some
    wait_until(mark.exists)
    wait_until(lambda: mark.read_text())
    idle = next(pid for pid in pool.pids if pid != int(mark.read_text()))
    os.kill(idle, signal.SIGKILL)


def test_ctrl_c_does_not_reach_the_workers():
    with worker_pool.WorkerPool(1, WORK) as pool:
        assert [value for _, (_, value, _) in pool.run(None, tasks(("interrupt", 5)))] == [5]


def test_busy_and_idle_workers_die_with_a_killed_parent(tmp_path):
    mark = tmp_path / "mark"
    program = f"""
from pretraining.worker_pool import WorkerPool
with WorkerPool(2, {WORK!r}) as pool:
    print(*pool.pids, flush=True)
    list(pool.run(None, [("a task", ("sleep", {str(mark)!r}))]))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    wait_until(mark.exists)
    assert len(pids) == 2 and not any(map(ended, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: all(map(ended, pids)))


def test_a_descriptor_is_kept_open_by_the_workers():
    reading, writing = os.pipe()
    with worker_pool.WorkerPool(1, WORK, [writing]) as pool:
        os.close(writing)
        os.set_blocking(reading, False)
        list(pool.run(None, tasks(("give", 1))))
        with pytest.raises(BlockingIOError):  # and not the end of the pipe
            os.read(reading, 1)
    assert os.read(reading, 1) == b""
    os.close(reading)
