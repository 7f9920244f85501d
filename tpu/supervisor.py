"""Keeps a run on a slice going until it is done: makes the slice, runs, makes it anew when it is lost.

The command must go on where it stopped when it is started again. Its exit status says the rest: 0
is done, 75 is stopped and saved, 2 is input that cannot work; anything else is a failure, and what
the API says of the slice tells of whom.
"""

import time
import uuid

from tpu import cloud_resources, remote
from tpu.cloud_api import Api
from tpu.cloud_errors import CloudError, ExistsError, NotFoundError, WaitedTooLongError
from tpu.supervisor_plan import BAD_INPUT, BUDGET_USED_UP, DONE, FAILED, GAVE_UP, Over, Plan
from tpu.supervisor_state import State, StateFile

QUICK_SECONDS = 300.0  # a failure so soon after the start is one of a row
MAX_QUICK_FAILURES = 5
FIRST_PAUSE_SECONDS = 5.0  # before the next start, doubled from failure to failure
LONGEST_PAUSE_SECONDS = 60.0
FIRST_SCARCE_PAUSE_SECONDS = 60.0  # after a creation that failed, doubled too
LONGEST_SCARCE_PAUSE_SECONDS = 1800.0
DELETE_SECONDS = 900.0
PATIENCE_SECONDS = 3600.0  # with an API in trouble; what runs meanwhile does not mind


class Supervisor:
    """The supervision of one slice."""

    def __init__(self, api: Api, shell: remote.Shell, plan: Plan, file: StateFile):
        self._api = api
        self._shell = shell
        self._plan = plan
        self._file = file
        self._name = plan.request.name
        self._state = State(self._name, api.zone, api.project)
        self._resumed = False
        self._quick_failures = 0
        self._scarce_pause = FIRST_SCARCE_PAUSE_SECONDS

    def run(self) -> int:
        """Returns the exit status: 0 done, 1 failed, 2 bad input, 3 budget used up, 4 gave up.

        Raises:
          CloudError: the API refuses a request, or ssh cannot be started.
        """
        with self._file.locked():
            self._state = self._file.read(self._name, self._api.zone, self._api.project)
            self._resumed = bool(self._state.creation)
            try:
                while True:
                    self._one_attempt()
            except Over as over:
                self._say(str(over))
                self._clean_up()
                if over.status == DONE and not self._plan.keep:
                    self._file.remove()
                return over.status
            except CloudError as error:
                self._say(f"error: {error}")
                self._clean_up()
                return FAILED

    def what_exists(self) -> str:
        """Returns a line on what may still exist and cost money, for whoever interrupts."""
        if not (self._state.creation or self._state.since):
            return (
                f"{self._name}: this supervisor has made nothing that still exists. {self._bill()}"
            )
        return (
            f"{self._name} still exists or is coming, costs money, and its run goes on. {self._bill()}. "
            f"The same command again takes it over; this deletes it: {self._delete_command()}"
        )

    def _one_attempt(self) -> None:
        sight = self._slice()
        started = time.monotonic()
        status = self._set_up(sight) or self._train()
        if status == DONE:
            raise Over(DONE, f"{self._name}: the run is done")
        if status == BAD_INPUT:
            raise Over(BAD_INPUT, f"{self._name}: exit 2: input that cannot work, so no other try")
        seconds = time.monotonic() - started
        sight = cloud_resources.look(self._api, self._name)
        self._say(
            f"{self._name}: exit {status} after {seconds:.0f} s; {self._api.clean(sight.said)}"
        )
        if sight.state != cloud_resources.READY:
            self._quick_failures = 0
            return
        self._quick_failures = self._quick_failures + 1 if seconds < QUICK_SECONDS else 0
        if self._quick_failures >= MAX_QUICK_FAILURES:
            raise Over(
                GAVE_UP,
                f"{self._name}: {self._quick_failures} runs in a row ended within {QUICK_SECONDS:.0f} s, "
                f"the last with exit {status}. Remedy: run the command on worker 0 by hand",
            )
        pause = FIRST_PAUSE_SECONDS * 2 ** max(self._quick_failures - 1, 0)
        # A machine that has only just come may not answer ssh for some minutes.
        self._sleep(
            LONGEST_PAUSE_SECONDS if status == remote.LOST else min(pause, LONGEST_PAUSE_SECONDS)
        )

    def _slice(self) -> cloud_resources.Sight:
        """Returns the slice when it is ready, made anew as often as it takes."""
        while True:
            self._check_budget()
            sight = cloud_resources.look(self._api, self._name)
            if sight.state == cloud_resources.GONE:
                self._lost()
                self._create()
            elif self._state.creation or self._plan.adopt:
                self._own(sight)
            if sight.state not in (cloud_resources.DEAD, cloud_resources.GOING):
                sight = self._wait()
            if sight.state == cloud_resources.READY:
                self._scarce_pause = FIRST_SCARCE_PAUSE_SECONDS
                # One that came while no supervisor looked counts from the beginning.
                early = self._resumed and self._is_ours(sight)
                self._state.begin(sight.created if early else None)
                self._resumed = False
                self._write()
                return sight
            if sight.state == cloud_resources.STOPPED:
                raise Over(FAILED, f"{self._name} was stopped by someone")
            if sight.state != cloud_resources.GONE:
                self._clear_away(sight)

    def _create(self) -> None:
        """Asks for the slice."""
        state = self._state
        if state.creation:
            if state.recreations >= self._plan.max_recreations:
                raise Over(GAVE_UP, f"{self._name}: lost after {state.recreations} recreations")
            state.recreations += 1
        # Written before the request: whoever takes over must know what may come of it.
        state.creation = uuid.uuid4().hex
        self._write()
        again = f", recreation {state.recreations}" if state.recreations else ""
        self._say(f"{self._name}: asking for {self._plan.request.accelerator_type}{again}")
        try:
            cloud_resources.create(self._api, self._plan.request, state.creation)
        except ExistsError:
            state.creation = ""
            self._write()
            raise

    def _wait(self) -> cloud_resources.Sight:
        paid_for = self._state.since is not None  # one that Google repairs, for instance
        timeout = min(self._plan.timeout, self._left()) if paid_for else self._plan.timeout
        appear = cloud_resources.APPEAR_SECONDS if self._state.creation else 0.0
        try:
            return cloud_resources.wait_until_ready(
                self._api, self._name, timeout, self._say, appear
            )
        except WaitedTooLongError:
            if paid_for and timeout < self._plan.timeout:
                raise self._used_up() from None
            raise
        except NotFoundError as error:
            if not self._state.creation:
                raise
            self._scarce(str(error))
            return cloud_resources.Sight(None, None)

    def _clear_away(self, sight: cloud_resources.Sight) -> None:
        """Deletes what is left of a slice that is lost."""
        self._lost()
        if not self._is_ours(sight):
            raise Over(
                FAILED,
                f"{self._name} is lost ({self._api.clean(sight.said)}) and was not made by this "
                f"supervisor. Remedy: --adopt, or {self._delete_command()}",
            )
        never_ran = sight.node is None
        cloud_resources.delete(self._api, self._name, DELETE_SECONDS, self._say)
        if never_ran:
            self._scarce(self._api.clean(sight.said))

    def _scarce(self, reason: str) -> None:
        """Waits longer and longer where a creation failed."""
        if self._state.recreations >= self._plan.max_recreations:
            raise Over(
                GAVE_UP, f"{self._name}: not made in {self._state.recreations + 1} tries: {reason}"
            )
        self._say(f"{reason}. Another try in {self._scarce_pause:.0f} s")
        self._sleep(self._scarce_pause)
        self._scarce_pause = min(2 * self._scarce_pause, LONGEST_SCARCE_PAUSE_SECONDS)

    def _set_up(self, sight: cloud_resources.Sight) -> int:
        """Runs the set-up on all workers of a slice that has not had it; returns the exit status."""
        mark = sight.incarnation or "unknown"
        if not self._plan.setup or self._state.set_up == mark:
            return 0
        self._say(f"{self._name}: set-up on {sight.num_workers} workers")
        started = time.monotonic()
        try:
            statuses = self._shell.run(range(sight.num_workers), self._plan.setup, self._left())
        except TimeoutError:
            raise self._used_up() from None
        if worst := remote.report(statuses, started):
            return FAILED if worst == BAD_INPUT else worst  # 2 has no such meaning here
        self._state.set_up = mark
        self._write()
        return 0

    def _train(self) -> int:
        """Runs the command on worker 0 as long as the budget lasts; returns the exit status."""
        self._say(f"{self._name}: the run starts on worker 0. {self._bill()}")
        stop_seconds = self._plan.stop_seconds
        command = remote.session(self._name, self._plan.command, stop_seconds)
        running = self._shell.start(0, command)
        with remote.stopped_together([running]):
            try:
                return running.wait(max(self._left() - stop_seconds, 0.0))
            except TimeoutError:
                self._say(f"{self._name}: the budget ends; the run is asked to save and stop")
            stopping = self._shell.start(0, remote.stop(self._name, stop_seconds))
            with remote.stopped_together([running, stopping]):
                for command_at_work in (running, stopping):
                    try:
                        command_at_work.wait(max(self._left(), 1.0))
                    except TimeoutError:
                        command_at_work.stop()
        if running.wait() == DONE:
            return DONE
        raise self._used_up()

    def _left(self) -> float:
        return self._plan.budget_seconds - self._state.seconds

    def _check_budget(self) -> None:
        if self._left() <= self._plan.stop_seconds:
            raise self._used_up()
        self._api.patience = min(PATIENCE_SECONDS, max(self._left(), 1.0))

    def _used_up(self) -> Over:
        return Over(BUDGET_USED_UP, f"{self._name}: the budget is used up")

    def _sleep(self, seconds: float) -> None:
        time.sleep(max(min(seconds, self._left()), 0.0))

    def _own(self, sight: cloud_resources.Sight) -> None:
        """Takes a slice for this supervisor's own where it is told to."""
        if self._plan.adopt and not self._is_ours(sight):
            self._say(f"{self._name}: adopted")
            self._state.creation = sight.creation or self._state.creation or "adopted"
            self._write()

    def _is_ours(self, sight: cloud_resources.Sight) -> bool:
        return self._plan.adopt or bool(
            self._state.creation and sight.creation == self._state.creation
        )

    def _lost(self) -> None:
        if self._state.since:
            self._state.end()
            self._write()

    def _clean_up(self) -> None:
        """Deletes what this supervisor made, and says what is left."""
        try:
            self._api.patience = PATIENCE_SECONDS
            sight = cloud_resources.look(self._api, self._name)
            if sight.state != cloud_resources.GONE and self._is_ours(sight) and not self._plan.keep:
                cloud_resources.delete(self._api, self._name, DELETE_SECONDS, self._say)
                sight = cloud_resources.Sight(None, None)
        except CloudError as error:
            self._say(f"error: {error}. It may still cost money: {self._delete_command()}")
            return
        if sight.state == cloud_resources.GONE:
            self._lost()
            self._state.creation = ""
            self._write()
            self._say(f"{self._name}: nothing of it exists. {self._bill()}")
        else:
            self._say(
                f"{self._name}: still there, and costs money. {self._bill()}. {self._delete_command()}"
            )

    def _bill(self) -> str:
        hours = self._state.seconds / 3600
        text = f"Used: {hours:.2f} of {self._plan.budget_seconds / 3600:.2f} h"
        if self._plan.price_per_hour:
            text += f", {hours * self._plan.price_per_hour:.2f} in money"
        return text

    def _delete_command(self) -> str:
        place = f"--zone={self._api.zone} --project={self._api.project}"
        return f"python -m tpu.cloud delete {self._name} {place}"

    def _write(self) -> None:
        self._file.write(self._state)

    def _say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
