"""Runs by name: values for the flags of `pretraining.run`, with what they reach and who says so.

The figures stand in `lamb_tf.recipes`, each with its source; here they become flags.
"""

import dataclasses
from typing import Any

from lamb_tf import recipes as published

DEFAULT_RECIPE = "demo"
# Places for masked tokens at a length: google-research/bert's README, MLPerf's README.
PREDICTIONS = {128: 20, 512: 76}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """A named set of values for flags.

    Attributes:
      flags: values by flag; a tuple holds one for each phase.
      about: what it is, in a line.
      reaches: what to expect, on what, and who measured it.
      sources: where each figure is from.
      finds_data: whether it may run on text that it finds on the machine.
      needs: flags that it cannot do without, beside those of the data.
    """

    flags: dict[str, Any]
    about: str
    reaches: str
    sources: tuple[str, ...] = ()
    finds_data: bool = False
    needs: tuple[str, ...] = ()


def _published(recipe: published.Recipe, needs: tuple[str, ...] = ()) -> RunRecipe:
    lengths = tuple(phase.sequence_length or 0 for phase in recipe.phases)
    schedules = recipe.schedules
    outcome, optimizer = recipe.outcome, recipe.optimizer_arguments()
    reached = f"{outcome.metric}: {outcome.lamb}" if outcome.lamb else "no result is published"
    if outcome.minutes:
        reached += f", in {outcome.minutes:.5g} minutes on {outcome.chips} TPUv3 chips"
    return RunRecipe(
        flags={
            "model": "large",
            "precision": "bfloat16",
            "max_seq_length": lengths,
            "max_predictions_per_seq": tuple(PREDICTIONS[length] for length in lengths),
            "train_batch_size": tuple(phase.batch_size for phase in recipe.phases),
            "num_train_steps": tuple(phase.steps for phase in recipe.phases),
            "learning_rate": tuple(s.learning_rate for s in schedules),
            "warmup_steps": tuple(s.warmup_steps for s in schedules),
            "warmup_first_step": tuple(s.first_step for s in schedules),
            "poly_power": tuple(s.power for s in schedules),
            "rewarmup": len(schedules) == len(recipe.phases),
            **optimizer,
            "save_every_steps": max(100, recipe.total_steps // 50),
            "eval_every_steps": max(100, recipe.total_steps // 20),
            "log_layers_every_steps": max(20, recipe.total_steps // 1000),
        },
        about=recipe.name,
        reaches=f"{reached} (published; not repeated with this program)",
        needs=needs,
        sources=tuple(f"{s.facts}: {s.status.value}: {s.where}" for s in recipe.sources),
    )


_LADDER_NAMES = {512: "512", **{1024 * k: f"{k}k" for k in (1, 2, 4, 8, 16, 32)}}

RECIPES = {
    "demo": RunRecipe(
        flags={},
        about="the tiny model on text that it finds in the Python installation",
        reaches="about 14.5% masked-LM accuracy on held-out text, 2.6 times that of always guessing the "
        "most frequent token, in 4 minutes on two cores (measured with this program)",
        finds_data=True,
    ),
    "demo_two_phase": RunRecipe(
        flags={
            "max_seq_length": (128, 512),
            "max_predictions_per_seq": (20, 76),
            "train_batch_size": (32, 8),
            "num_train_steps": (500, 100),
            "learning_rate": (0.01, 0.003),
            "warmup_steps": (100, 20),
            "save_every_steps": 100,
            "eval_every_steps": 250,
            "log_layers_every_steps": 10,
        },
        about="the tiny model at length 128, then at 512 with a warm-up of its own",
        reaches="about 11% masked-LM accuracy on held-out text at either length, twice that of always guessing "
        "the most frequent token, in 5 minutes on two cores (measured with this program)",
        finds_data=True,
    ),
    **{
        f"bert_large_{_LADDER_NAMES[recipe.phases[0].batch_size]}": _published(recipe)
        for recipe in published.LADDER
    },
    "bert_large_64k_32k": _published(published.MIXED_BATCH),
    "bert_large_64k_32k_nvidia": _published(published.NVIDIA_MIXED_BATCH),
    "mlperf_8k": _published(published.MLPERF_BERT, needs=("init_checkpoint",)),
}
