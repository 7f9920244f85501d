"""`python -m pretraining.resume_check`: proof that a run which is killed ends as if it had not been.

    python -m pretraining.resume_check --kills=20 --folder=/tmp/check -- --recipe=demo_two_phase

What stands behind `--` goes to `pretraining.run`. The run is made twice: in FOLDER/whole without a
break; in FOLDER/killed with SIGKILL at moments drawn from --seed, while it starts, trains, saves or
changes phase, and repeated until it is done. Then every array of both final checkpoints is compared
bit for bit, and every line of the logs, rates left out.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from pretraining import console, program
from pretraining.errors import InputError
from pretraining.flags import check_limits, flag

DIFFERENT = 1  # exit status where the two runs differ, or fewer kills were possible than asked for
TRAINS, SAVES, STARTS, BOUNDARY = "trains", "saves", "starts", "changes phase"
POLL_SECONDS = 0.001
SAVE_SECONDS = 0.06  # a kill comes up to so long after the first file of a save was seen
LOGS = ("metrics.jsonl", "evaluations.jsonl", "layers.jsonl")
RATES = re.compile("per_sec|seconds|utilization")
# Not of the training: how the checkpoint is laid out, and how often one was written.
NOT_COMPARED = re.compile("_CHECKPOINTABLE_OBJECT_GRAPH|^save_counter/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """The flags of `python -m pretraining.resume_check`."""

    folder: str = flag("", "new or empty local folder for both runs")
    kills: int = flag(20, "how often the second run is killed", at_least=1)
    seed: int = flag(1, "of the moments", at_least=0)

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.folder:
            raise InputError("--folder: expected. Received: nothing")
        folder = pathlib.Path(self.folder)
        taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
        if "://" in self.folder or taken:
            raise InputError(f"--folder={self.folder}: expected a new or empty local folder")


class Run:
    """A run in a folder of its own, seen from outside by the files that it writes."""

    def __init__(self, folder: pathlib.Path, flags: Sequence[str]):
        self.folder = folder
        self._log = folder.with_suffix(".log")
        self._command = [sys.executable, "-m", "pretraining.run", *flags, f"--output_dir={folder}"]

    @contextlib.contextmanager
    def started(self):
        """Starts the program, or starts it again; it does not outlive the block."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            self._process.kill()  # SIGKILL; of no effect on one that has ended
            self._process.wait()

    def ended(self) -> bool:
        """Tells whether the program has ended by itself.

        Raises:
          InputError: it has failed.
        """
        status = self._process.poll()
        if status:
            last = (self._log.read_text(errors="replace").splitlines() or ["no message"])[-1]
            raise InputError(
                f"expected a run that ends well behind --. Received: exit status {status} and: "
                f"{last} (all of it in {self._log})"
            )
        return status == 0

    def wait(self, until: Callable[[], bool]) -> bool:
        """Waits for a condition; returns False where the run ended before it was met."""
        while not until():
            if self.ended():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def logged_step(self) -> int:
        """The step of the last whole line in metrics.jsonl."""
        with contextlib.suppress(OSError):
            for line in reversed((self.folder / "metrics.jsonl").read_bytes().splitlines()):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return int(json.loads(line)["step"])
        return 0

    def saves(self) -> set[str]:
        """The names in checkpoints/, finished or not."""
        with contextlib.suppress(OSError):
            return set(os.listdir(self.folder / "checkpoints"))
        return set()

    def saved_step(self) -> int:
        """The step of the newest checkpoint that has its index."""
        steps = (re.fullmatch(r"ckpt-(\d+)\.index", name) for name in self.saves())
        return max((int(step[1]) for step in steps if step), default=0)


@dataclasses.dataclass(frozen=True)
class Whole:
    """What the run without a break tells: updates in all and in a loop, and times in seconds."""

    steps: int
    boundaries: tuple[int, ...]  # steps at which a phase but the first one begins
    loop_steps: int
    loop_seconds: float


def run_whole(run: Run) -> Whole:
    """Makes the run without a break and takes its times."""
    seen = {0: time.monotonic()}
    with run.started():
        while not run.ended():
            seen.setdefault(run.logged_step(), time.monotonic())
            time.sleep(0.02)
    steps = sorted(seen)
    if len(steps) < 3:
        raise InputError("expected a run of several loops behind --. Received: a shorter one")
    phases = json.loads((run.folder / "config.json").read_text()).get("phases") or []
    return Whole(
        steps=steps[-1],
        boundaries=tuple(phase["first_step"] for phase in phases[1:]),
        loop_steps=steps[1],
        loop_seconds=(seen[steps[-1]] - seen[steps[1]]) / (len(steps) - 2),
    )


def plan_kills(whole: Whole, kills: int, draw: random.Random) -> list[tuple[str, float]]:
    """Spreads kills evenly over the run; returns what it shall be doing, and from which step on."""
    width = whole.steps / kills
    turns, planned = itertools.cycle((TRAINS, SAVES, STARTS)), []
    for number in range(kills):
        step = (number + draw.random()) * width
        near = [b for b in whole.boundaries if abs(b - step) <= width]
        planned.append((BOUNDARY, near[0] - whole.loop_steps) if near else (next(turns), step))
    return planned


class Killer:
    """Kills a run, again and again."""

    def __init__(self, run: Run, whole: Whole, draw: random.Random):
        self._run = run
        self._whole = whole
        self._draw = draw
        self._start_seconds = math.inf  # the shortest start that was seen

    def kill_until_done(self, kills: int) -> int:
        """Starts and kills the run, at last lets it end; returns the number of kills."""
        console.say(f"{'kill':>4}  {'while it':14}{'after s':>8}{'logged':>8}{'goes on from':>14}")
        killed = 0
        for moment, step in plan_kills(self._whole, kills, self._draw):
            started = time.monotonic()
            with self._run.started():
                if not self._wait_for(moment, step):
                    return killed
            killed += 1
            console.say(
                f"{killed:>4}  {moment:14}{time.monotonic() - started:>8.1f}"
                f"{self._run.logged_step():>8}{self._run.saved_step():>14}"
            )
        with self._run.started():
            self._run.wait(lambda: False)
        return killed

    def _wait_for(self, moment: str, step: float) -> bool:
        """Waits for the moment of a kill; returns False where the run ended before."""
        run, draw = self._run, self._draw.uniform
        saved, stale, started = run.saved_step(), run.logged_step(), time.monotonic()
        # Lines that the start before wrote beyond its checkpoint stand there until this one cuts them.
        cut = stale <= saved

        def has_logged() -> bool:
            nonlocal cut
            logged = run.logged_step()
            cut = cut or logged != stale
            return cut and logged > saved

        if moment == STARTS and self._start_seconds < math.inf:
            end = started + draw(0.0, self._start_seconds)
            return run.wait(lambda: time.monotonic() >= end or has_logged())
        if not run.wait(has_logged):
            return False
        self._start_seconds = min(self._start_seconds, time.monotonic() - started)
        if not run.wait(lambda: run.logged_step() >= step):
            return False
        if moment == SAVES:
            names = run.saves()
            if not run.wait(lambda: bool(run.saves() - names)):
                return False
            end = time.monotonic() + draw(0.0, SAVE_SECONDS)
        else:
            loops = 4.0 if moment == BOUNDARY else 1.0  # till after its save and evaluation
            end = time.monotonic() + draw(0.0, loops * self._whole.loop_seconds)
        return run.wait(lambda: time.monotonic() >= end)


def checkpoint_differences(whole: pathlib.Path, killed: pathlib.Path) -> tuple[int, list[str]]:
    """Returns how many arrays the final checkpoints have, and a line for each that differs."""
    import numpy as np
    import tensorflow as tf

    newest = [tf.train.latest_checkpoint(str(run / "checkpoints")) for run in (whole, killed)]
    if None in newest or len({os.path.basename(path) for path in newest}) > 1:
        return 0, [f"final checkpoints: {newest[0]} and {newest[1]}"]
    readers = [tf.train.load_checkpoint(path) for path in newest]
    names = [
        {n for n in reader.get_variable_to_shape_map() if not NOT_COMPARED.search(n)}
        for reader in readers
    ]
    different = [f"{name}: in one of them only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        a, b = (np.asarray(reader.get_tensor(name)) for reader in readers)
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            far = f", up to {np.max(np.abs(a - b))} apart" if a.shape == b.shape else ""
            different.append(f"{name}: {a.dtype} {a.shape}, {b.dtype} {b.shape}{far}")
    return len(names[0]), different


def log_differences(whole: pathlib.Path, killed: pathlib.Path, name: str) -> tuple[int, list[str]]:
    """Returns how many lines the first log has, and a line for each that differs, rates left out."""
    paths = (whole / name, killed / name)
    texts = (path.read_text() if path.exists() else "" for path in paths)
    logs = [[_comparable(line) for line in text.splitlines()] for text in texts]
    different = [
        f"{name} line {number}: {a} and {b}"
        for number, (a, b) in enumerate(itertools.zip_longest(*logs), 1)
        if a != b
    ]
    return len(logs[0]), different


def _comparable(line: str) -> str:
    try:
        values = json.loads(line)
    except ValueError:
        return line  # torn: equal to no whole one
    return json.dumps({k: v for k, v in values.items() if not RATES.search(k)}, sort_keys=True)


def check(run_flags: Sequence[str], config: CheckConfig) -> int:
    """Makes both runs and compares them; returns the exit status."""
    folder = pathlib.Path(config.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    whole, broken = (Run(folder / name, run_flags) for name in ("whole", "killed"))
    with console.timed("Without a break"):
        facts = run_whole(whole)
    with console.timed("Killed and restarted"):
        kills = Killer(broken, facts, random.Random(config.seed)).kill_until_done(config.kills)
    arrays, different = checkpoint_differences(whole.folder, broken.folder)
    logs = [log_differences(whole.folder, broken.folder, name) for name in LOGS]
    lines, different = sum(n for n, _ in logs), sum((lines for _, lines in logs), different)
    for difference in different[:20]:
        console.say(f"Different: {difference[:300]}")
    if not different:
        console.say(f"Equal: {arrays} arrays bit for bit, {lines} lines of logs")
    if kills < config.kills:
        console.say(
            f"Killed {kills} times of {config.kills}: the run was done before; more updates make room"
        )
    return DIFFERENT if different or kills < config.kills else 0


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns 0, 1 where the runs differ, 2 where something given cannot work."""
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    work = functools.partial(_check, argv[at + 1 :])
    return program.run(argv[:at], "pretraining.resume_check", CheckConfig, work)


def _check(run_flags: Sequence[str], config: CheckConfig) -> int:
    if any(f.lstrip("-").startswith("output_dir") for f in run_flags):
        raise InputError("--output_dir: expected only --folder here, which both runs are below")
    return check(run_flags, config)


if __name__ == "__main__":
    program.leave(main(sys.argv))
