"""What a run writes down as it goes: lines of JSON and TensorBoard, each step once."""

from collections.abc import Mapping, Sequence
from typing import Any

from lamb_tf.update_rule import LayerStatistics
from pretraining.metrics_log import MetricsLog, read
from pretraining.run_directory import RunDirectory
from pretraining.tensorboard_log import TensorBoardLog

# In TensorBoard these stand for themselves, each evaluation beside the training curve.
_NOT_A_CURVE = ("phase", "eval_steps")


class RunLogs:
    """The logs of one start, cut to the step from which it goes on.

    Args:
      directory: of the run.
      start_step: updates made before; what the logs hold beyond it is dropped.
      layers: the names of the trainable variables.
      evaluated: what an evaluation after `start_step` is of; one of something else is dropped.

    Attributes:
      evaluated_step: the updates before the last evaluation, 0 where there is none.
    """

    def __init__(
        self,
        directory: RunDirectory,
        start_step: int,
        layers: Sequence[str],
        evaluated: Mapping[str, Any],
    ):
        evaluations = directory.join("evaluations.jsonl")
        before = [line for line in read(evaluations) if line["step"] <= start_step]
        newest = before[-1] if before else {}
        self._evaluated = evaluated
        outdated = newest.get("step") == start_step and not (evaluated.items() <= newest.items())
        last_evaluation = start_step - 1 if outdated else start_step
        self.evaluated_step = 0 if outdated else newest.get("step", 0)
        self._metrics = MetricsLog(directory.join("metrics.jsonl"), start_step)
        self._evaluations = MetricsLog(evaluations, last_evaluation)
        self._layers = MetricsLog(directory.join("layers.jsonl"), start_step)
        if not self._layers.last:
            self._layers.write(0, {"names": list(layers)})
        self._train_board = TensorBoardLog(directory.join("tensorboard/train"), start_step)
        self._eval_board = TensorBoardLog(directory.join("tensorboard/eval"), last_evaluation)

    @property
    def last(self) -> dict[str, Any]:
        """The metrics that were written last, without their step."""
        return self._metrics.last

    @property
    def last_evaluation(self) -> dict[str, Any]:
        """The result of the evaluation that was written last, without its step."""
        left_out = ("phase", *self._evaluated)
        return {k: v for k, v in self._evaluations.last.items() if k not in left_out}

    def training(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of the updates up to a step."""
        self._metrics.write(step, dict(values))
        self._train_board.scalars(step, _curves(values))

    def layers(self, step: int, statistics: Mapping[str, LayerStatistics]) -> None:
        """Writes norms and trust ratio of every layer in the update that led to a step."""
        columns = {
            kind: [getattr(figures, kind) for figures in statistics.values()]
            for kind in LayerStatistics._fields
        }
        self._layers.write(step, columns)
        self._train_board.scalars(
            step,
            {
                f"{kind}/{name}": getattr(figures, kind)
                for name, figures in statistics.items()
                for kind in LayerStatistics._fields
            },
        )

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the result of an evaluation after so many updates."""
        self.evaluated_step = step
        self._evaluations.write(step, dict(values))
        self._eval_board.scalars(step, _curves(values))

    def flush(self) -> None:
        """Brings everything to the disk or the bucket; a checkpoint comes after."""
        for log in (self._metrics, self._evaluations, self._layers):
            log.flush()
        for board in (self._train_board, self._eval_board):
            board.flush()

    def close(self) -> None:
        """Closes the logs; nothing can be written any more."""
        for log in (self._metrics, self._evaluations, self._layers):
            log.close()
        for board in (self._train_board, self._eval_board):
            board.close()


class NoLogs:
    """The logs of a worker that writes nothing, because another one does."""

    last: dict[str, Any] = {}  # noqa: RUF012  # nobody writes
    last_evaluation: dict[str, Any] = {}  # noqa: RUF012

    def training(self, step: int, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    layers = evaluation = training

    def flush(self) -> None:
        """Does nothing."""

    close = flush


def _curves(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_A_CURVE and isinstance(value, int | float)
    }
