"""The result of a run: `summary.json`, and the same in a few lines."""

from collections.abc import Mapping
from typing import Any

from pretraining import console, evaluation
from pretraining.data import Data
from pretraining.run_directory import RunDirectory
from pretraining.run_report import write_report


def publish(
    directory: RunDirectory,
    *,
    step: int,
    checkpoint: str | None,
    last: Mapping[str, Any],
    result: Mapping[str, float] | None,
    evaluated: Mapping[str, Any],
    data: Data,
) -> None:
    """Writes `summary.json` and `report.html`, and prints the result.

    Args:
      directory: of the run.
      step: updates made.
      checkpoint: the path of the last one.
      last: the metrics of the last updates.
      result: of the last evaluation, None where there is none.
      evaluated: what that was of.
      data: the records of the last phase.
    """
    summary: dict[str, Any] = {
        "step": step,
        "checkpoint": checkpoint,
        "train": dict(last),
        "evaluated": dict(evaluated),
    }
    if result:
        token = evaluation.most_frequent_label(data.train)
        summary["eval"] = {
            **result,
            "most_frequent_token": data.words.tokens[token],
            "most_frequent_token_accuracy": evaluation.constant_accuracy(token, data.held_out),
        }
    directory.write_json("summary.json", summary)
    write_report(directory)
    say_result(summary, directory)


def say_result(summary: Mapping[str, Any], directory: RunDirectory) -> None:
    """Prints what a finished run has reached and where to find it."""
    result = summary.get("eval")
    if result:
        console.say(
            f"Held-out masked-LM accuracy: {result['mlm_accuracy']:.2%}. Always guessing the most "
            f"frequent token, {result['most_frequent_token']!r}: "
            f"{result['most_frequent_token_accuracy']:.2%}."
        )
    console.say(f"Checkpoint: {summary['checkpoint']}")
    console.say(f"Summary: {directory.join('summary.json')}")
    console.say(f"Report: {directory.join('report.html')}")
