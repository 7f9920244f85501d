"""What a run says when its numbers go bad: which layer, which step, what to do."""

import math
from collections.abc import Sequence

import tensorflow as tf

from pretraining.errors import InputError
from pretraining.train_step import SkippedSteps, on_first_replica

# A loss of so many times that of calling all tokens equally likely comes from weights gone wild.
EXPLODED = 10.0
_REMEDY = (
    "A lower --learning_rate or a longer --warmup_steps may help; they make another run, so it needs "
    "another --output_dir, and --init_checkpoint if it shall start from a checkpoint of this one"
)


def check_skipped(
    longest: int, limit: int, skipped: SkippedSteps, layers: Sequence[str], step: int
) -> None:
    """Looks at the updates that were left out because of their gradient.

    Args:
      longest: the most in a row since the last look.
      limit: `--max_skipped_steps`.
      skipped: the counters.
      layers: names of the trainable variables.
      step: updates up to now.

    Raises:
      InputError: there were too many in a row.
    """
    if limit and longest >= limit:
        first, layer = int(skipped.first.numpy()), layers[int(skipped.layer.numpy())]
        raise InputError(
            f"--max_skipped_steps={limit}: expected finite gradients. Received: {longest} updates in a "
            f"row, from update {first} on, with NaN or infinity; the first layer with it is {layer}. "
            f"Stopped after update {step}. {_REMEDY}"
        )


def check_loss(loss: float, vocab_size: int, layer: str, step: int) -> None:
    """Looks at the mean loss of some updates; NaN, of none that was made, is no news here.

    Args:
      loss: masked-LM and next-sentence loss together.
      vocab_size: tokens in the vocabulary.
      layer: name of the variable with the largest gradient.
      step: updates up to now.

    Raises:
      InputError: the loss has exploded.
    """
    limit = EXPLODED * (math.log(vocab_size) + math.log(2))
    if loss > limit:
        raise InputError(
            f"--learning_rate: expected a loss below {limit:.0f}, {EXPLODED:.0f} times that of guessing. "
            f"Received: {loss:.4g} at update {step}; the layer with the largest gradient is {layer}. "
            f"{_REMEDY}"
        )


def diverged(what: str, step: int) -> InputError:
    """The error of a run whose weights or held-out loss are not finite any more."""
    return InputError(
        f"--learning_rate: expected finite weights and losses. Received: NaN or infinity in {what} "
        f"after update {step}. {_REMEDY}"
    )


class WeightCheck:
    """Looks at the weights after an update, in one program on the device.

    Operation by operation it would be hundreds of round trips to a TPU's hosts, or all the weights
    would be fetched to look at them here.

    Args:
      strategy: of the run.
      variables: the weights.
    """

    def __init__(self, strategy: tf.distribute.Strategy, variables: Sequence[tf.Variable]):
        self._strategy = strategy
        self._variables = list(variables)

    def __call__(self, step: int) -> None:
        """Looks at them.

        Args:
          step: updates made so far.

        Raises:
          InputError: one of them is not finite.
        """
        for variable, finite in zip(self._variables, self._are_finite().numpy(), strict=True):
            if not finite:
                raise diverged(variable.name.removesuffix(":0"), step)

    @tf.function
    def _are_finite(self) -> tf.Tensor:
        def look() -> tf.Tensor:
            values = [tf.convert_to_tensor(variable) for variable in self._variables]
            return tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in values])

        return on_first_replica(self._strategy, self._strategy.run(look))
