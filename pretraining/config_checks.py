"""What must hold between the flags of `pretraining.run`, beside the limits of each."""

import dataclasses
from typing import TYPE_CHECKING, Any

from pretraining.errors import InputError
from pretraining.recipes import RECIPES
from tpu.chips import parse_slice

if TYPE_CHECKING:
    from pretraining.config import Config

_SCHEDULE = (
    "learning_rate",
    "warmup_steps",
    "warmup_first_step",
    "poly_power",
    "end_learning_rate",
)


def spread_over_phases(config: "Config") -> dict[str, tuple[Any, ...]]:
    """Returns a value for every phase of each flag that may differ from phase to phase.

    Raises:
      InputError: two flags were given for different numbers of phases.
    """
    names = [f.name for f in dataclasses.fields(config) if f.metadata["per_phase"]]
    values = {name: getattr(config, name) for name in names}
    values = {n: v if isinstance(v, tuple) else (v,) for n, v in values.items()}
    count = max(len(value) for value in values.values())
    longest = next(name for name, value in values.items() if len(value) == count)
    spread = {}
    for name, value in values.items():
        if len(value) not in (1, count):
            both = " and ".join(f"--{n}={','.join(map(str, values[n]))}" for n in (name, longest))
            raise InputError(
                f"{both}: expected lists of one length, a value for each phase "
                f"(--recipe={config.recipe} has those that are not given by hand). "
                f"Received: {len(value)} and {count} values"
            )
        spread[name] = value if len(value) == count else value * count
    return spread


def warmups_of(config: "Config") -> tuple[int, ...]:
    """Returns the warm-up of each phase, worked out where it is not given.

    Raises:
      InputError: the schedule makes no sense.
    """
    if not config.rewarmup:
        for name in _SCHEDULE:
            if len(set(getattr(config, name))) > 1:
                raise InputError(
                    f"--{name}={','.join(map(str, getattr(config, name)))}: expected one value where "
                    "--rewarmup=false makes one schedule of all phases"
                )
    totals = (
        config.num_train_steps if config.rewarmup else (config.total_steps,) * config.num_phases
    )
    defaults = (min(100, total // 8) for total in totals)
    warmups = tuple(d if w == -1 else w for w, d in zip(config.warmup_steps, defaults, strict=True))
    for i, total in enumerate(totals):
        warmup, first = warmups[i], config.warmup_first_step[i]
        if warmup + first >= total:
            raise InputError(
                f"--warmup_steps={warmup}: expected the warm-up to end before --num_train_steps. "
                f"Received: --num_train_steps={total} (--recipe={config.recipe} has what is not given "
                "by hand)"
            )
        if -first > warmup:
            raise InputError(
                f"--warmup_first_step={first}: expected at least minus --warmup_steps. Received: "
                f"--warmup_steps={warmup}"
            )
        if config.end_learning_rate[i] > config.learning_rate[i]:
            raise InputError(
                f"--end_learning_rate={config.end_learning_rate[i]}: expected at most "
                f"--learning_rate. Received: --learning_rate={config.learning_rate[i]}"
            )
    return warmups


def check_files(config: "Config") -> None:
    """Own records come with a vocabulary and, where there is an evaluation, held-out ones.

    Raises:
      InputError: one of them is missing.
    """
    needed = {
        "train": ("input_files", "vocab_file"),
        "train_and_eval": ("input_files", "eval_files", "vocab_file"),
        "eval": ("eval_files", "vocab_file"),
    }[config.mode]
    given = [n for n in ("input_files", "eval_files", "vocab_file") if getattr(config, n)]
    if config.preflight:  # needs no records, only the size of the vocabulary
        return
    missing = [name for name in needed if not getattr(config, name)]
    if given and missing:
        raise InputError(
            f"--{missing[0]}: expected beside --{given[0]}={getattr(config, given[0])} for "
            f"--mode={config.mode}. Received: nothing"
        )
    if config.eval_checkpoint and config.mode != "eval":
        raise InputError(
            f"--eval_checkpoint={config.eval_checkpoint}: expected --mode=eval beside it. "
            f"Received: --mode={config.mode}"
        )


def check_needs(config: "Config") -> None:
    """Looks for what a recipe cannot do without; a plan can be had without it.

    Raises:
      InputError: it is missing.
    """
    recipe = RECIPES[config.recipe]
    needs = recipe.needs if config.mode != "eval" else ()
    data = () if recipe.finds_data else ("eval_files" if config.mode == "eval" else "input_files",)
    for name in (*data, *needs):
        if not (getattr(config, name) or config.dry_run or config.preflight):
            raise InputError(f"--{name}: expected for --recipe={config.recipe}. Received: nothing")


def check_preflight(config: "Config") -> None:
    """Checks the slice of a preflight, and that what belongs to one has one.

    Raises:
      InputError: there is no such slice, or none is given.
    """
    for name in ("preflight_search", "price_per_chip_hour"):
        if getattr(config, name) and not config.preflight:
            raise InputError(
                f"--{name}={getattr(config, name)}: expected --preflight beside it. Received: nothing"
            )
    if config.preflight:
        try:
            parse_slice(config.preflight)
        except ValueError as error:
            raise InputError(f"--preflight: {error}") from None
        if config.mode == "eval":
            raise InputError("--mode=eval: expected a mode that trains beside --preflight")
