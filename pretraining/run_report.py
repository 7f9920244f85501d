"""`python -m pretraining.run_report`: one page about a run, `report.html` beside its summary.

The page holds all that it shows: no script, no style sheet, no image from elsewhere. `run` writes it
when it ends; this program writes it anew, also of a run that is under way.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretraining import program
from pretraining.errors import InputError
from pretraining.flags import check_limits, flag

if TYPE_CHECKING:  # it imports TensorFlow
    from pretraining.run_directory import RunDirectory

# Matplotlib would tell of a home that cannot be written to, and of the fonts that it looks for.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The flags of `python -m pretraining.run_report`."""

    output_dir: str = flag("./lamb_tf_run", "folder of the run, local or gs://")

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.output_dir:
            raise InputError("--output_dir: expected a folder. Received: nothing")


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns 0, or 2 where there is no run."""
    return program.run(argv, "pretraining.run_report", ReportConfig, _report)


def _report(config: ReportConfig) -> None:
    from pretraining import console
    from pretraining.run_directory import RunDirectory

    console.say(write_report(RunDirectory(config.output_dir)))


def write_report(directory: "RunDirectory") -> str:
    """Writes `report.html` into the folder of a run, whole or not at all; returns its path.

    Raises:
      InputError: there is no run in the folder, or the page cannot be written.
    """
    from pretraining import files, metrics_log, report_page
    from pretraining.run_directory import writing

    facts = report_page.Facts(
        path=directory.path,
        config=directory.read_json("config.json") or {},
        summary=directory.read_json("summary.json") or {},
        metrics=metrics_log.read(directory.join("metrics.jsonl")),
        evaluations=metrics_log.read(directory.join("evaluations.jsonl")),
        layers=metrics_log.read(directory.join("layers.jsonl")),
    )
    if not (facts.config or facts.metrics):
        raise InputError(
            f"--output_dir={directory.path}: expected the folder of a run, with config.json in it. "
            "Received: one without"
        )
    path = directory.join("report.html")
    page = report_page.render(facts)
    with writing(path):
        files.write(path, page)
    return path


if __name__ == "__main__":
    program.leave(main(sys.argv))
