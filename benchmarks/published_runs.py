"""The plan's step times beside ten published runs of BERT-Large on TPUv3 pods.

    python benchmarks/published_runs.py

Predicts every run from its batches, lengths and chips with `tpu.plan`, fits the plan's one constant on
every second row, and prints and writes the error of all of them. It measures nothing on this machine.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # measures this checkout

from benchmarks import report
from lamb_tf import recipes
from pretraining import model_flops
from pretraining.model import MODELS
from pretraining.recipes import PREDICTIONS
from tpu.chips import CHIPS, Slice, parse_slice
from tpu.plan import MATMUL_EFFICIENCY, StepWork, step_bound, step_time

VOCABULARY = 30522  # of the published BERTs
BYTES = {"lamb": 40, "adamw": 28}  # of an update and a parameter: benchmarks/update_cost.py
MLPERF = "mlcommons/training_results_v0.7, Google/results/tpu-v3-32-TF2.0/bert/result_0.txt"
COLUMNS = (
    "run slice published_minutes bound_minutes predicted_minutes error_percent own_efficiency fitted "
    "efficiency source lamb_tf machine command date"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run that somebody timed.

    Attributes:
      name: what was run.
      phases: its batches, lengths and steps.
      where: the slice.
      minutes: of all steps together.
      optimizer: "lamb" or "adamw".
      source: who says so.
    """

    name: str
    phases: tuple[recipes.Phase, ...]
    where: Slice
    minutes: float
    optimizer: str
    source: str


def published_runs() -> tuple[PublishedRun, ...]:
    """Returns the nine rows of the paper's table 1, in its order, and MLPerf's."""
    lamb = [_of_recipe(recipe) for recipe in (*recipes.LADDER, recipes.MIXED_BATCH)]
    adam = dataclasses.replace(
        lamb[0], name=f"{recipes.LADDER[0].name}, Adam", minutes=81.4 * 60, optimizer="adamw"
    )
    # Between the first block_start and its block_stop 1117 updates of 448 sequences: 60.8 sequences a
    # second and chip.
    mlperf = PublishedRun(
        name="BERT-Large, batch 448, length 512, MLPerf v0.7, TF2",
        phases=(recipes.Phase(448, 1117, 512),),
        where=parse_slice("v3-32"),
        minutes=(1594330486814 - 1594329972397) / 60e3,
        optimizer="lamb",
        source=MLPERF,
    )
    return (adam, *lamb, mlperf)


def _of_recipe(recipe: recipes.Recipe) -> PublishedRun:
    chips, minutes = recipe.outcome.chips, recipe.outcome.minutes
    assert chips is not None and minutes is not None
    return PublishedRun(
        name=f"{recipe.name}, LAMB",
        phases=recipe.phases,
        where=parse_slice(f"v3-{chips * CHIPS['v3'].devices}"),
        minutes=minutes,
        optimizer="lamb",
        source=f"{recipes.PAPER}, table 1",
    )


def fitted_rows(runs: tuple[PublishedRun, ...]) -> tuple[PublishedRun, ...]:
    """Returns the rows that the constant is fitted on: every second one, from the first."""
    return runs[::2]


def predicted_minutes(run: PublishedRun, efficiency: float | None = None) -> float:
    """Returns the time that the plan expects, or its bound.

    Args:
      run: what was run.
      efficiency: of the matrix products; `None` for the bound.
    """
    seconds = 0.0
    for phase in run.phases:
        work = _work(phase, run)
        time = (
            step_bound(work, run.where)
            if efficiency is None
            else step_time(work, run.where, efficiency=efficiency)
        )
        seconds += phase.steps * time.total
    return seconds / 60


def _work(phase: recipes.Phase, run: PublishedRun) -> StepWork:
    length = phase.sequence_length
    assert length is not None
    rows = phase.batch_size / run.where.num_devices
    bert = MODELS["large"]
    parameters = model_flops.parameter_count(bert, VOCABULARY)
    return StepWork(
        flops=model_flops.flops(
            bert,
            VOCABULARY,
            tokens=rows * length,
            token_pairs=rows * length**2,
            predictions=rows * PREDICTIONS[length],
            rows=rows,
        ),
        update_bytes=BYTES[run.optimizer] * parameters,
        all_reduce_bytes=4 * parameters,
    )


def log_error(run: PublishedRun, efficiency: float) -> float:
    """Returns the logarithm of predicted over published time."""
    return math.log(predicted_minutes(run, efficiency) / run.minutes)


def fit_efficiency(runs: tuple[PublishedRun, ...]) -> float:
    """Returns the constant of the least sum of squared logarithms, by ternary search.

    Args:
      runs: to fit on.
    """

    def loss(efficiency: float) -> float:
        return sum(log_error(run, efficiency) ** 2 for run in runs)

    low, high = 0.01, 1.0
    while high - low > 1e-7:
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def error_table() -> list[dict]:
    """Returns a row for every run, with the constant of `tpu.plan`."""
    runs = published_runs()
    fitted = fitted_rows(runs)
    rows = []
    for run in runs:
        predicted = predicted_minutes(run, MATMUL_EFFICIENCY)
        rows.append(
            {
                "run": run.name,
                "slice": run.where.name,
                "published_minutes": round(run.minutes, 2),
                "bound_minutes": round(predicted_minutes(run), 2),
                "predicted_minutes": round(predicted, 2),
                "error_percent": round(100 * (predicted / run.minutes - 1), 1),
                "own_efficiency": round(fit_efficiency((run,)), 4),
                "fitted": run in fitted,
                "efficiency": MATMUL_EFFICIENCY,
                "source": run.source,
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    """Prints the errors as a Markdown table."""
    print("| run | slice | published | bound | predicted | error | its own efficiency | fitted |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['run']} | {row['slice']} | {row['published_minutes']:.1f} min | "
            f"{row['bound_minutes']:.1f} | {row['predicted_minutes']:.1f} | "
            f"{row['error_percent']:+.0f}% | {row['own_efficiency']:.3f} | "
            f"{'yes' if row['fitted'] else 'no'} |"
        )


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=report.RESULTS / "published_runs.csv"
    )
    arguments = parser.parse_args()
    rows = error_table()
    print_table(rows)
    best = fit_efficiency(fitted_rows(published_runs()))
    print(f"Fitted on every second row: {best:.4f}; tpu.plan has {MATMUL_EFFICIENCY}")
    facts = report.facts(())
    report.write_csv(arguments.output, [{**row, **facts} for row in rows], COLUMNS)


if __name__ == "__main__":
    main()
