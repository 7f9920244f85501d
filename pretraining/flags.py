"""Command lines: a program's flags are the fields of one frozen dataclass, checked once.

This module runs before TensorFlow is imported, so that a mistyped flag is answered at once.
"""

import dataclasses
import importlib
import math
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from absl import flags

from pretraining.errors import InputError

Settings = TypeVar("Settings")
_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


def flag(
    default: Any, text: str, *, identity: bool = False, per_phase: bool = False, **limits: Any
) -> Any:
    """A field that is a flag.

    Args:
      default: its default value; its type is the flag's type.
      text: what `--help` says.
      identity: whether another value makes another run of it (refused at a restart).
      per_phase: whether it takes a comma-separated list as well, a value for each phase of a run;
        it arrives as a tuple.
      **limits: `choices`, `at_least`, `above`, `below` or `at_most`.
    """
    metadata = {"help": text, "identity": identity, "per_phase": per_phase, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


def check_limits(settings: Any) -> None:
    """Checks every field of a dataclass of flags against its limits.

    Raises:
      InputError: names the first flag that is out of its range.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            _check_limits(field.name, each, **field.metadata["limits"])


def _check_limits(
    name: str,
    value: Any,
    choices: tuple | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name}={value}: expected a finite number")
    if choices is not None and value not in choices:
        raise InputError(f"--{name}={value}: expected one of {', '.join(choices)}")
    if at_least is not None and value < at_least:
        raise InputError(f"--{name}={value}: expected at least {at_least}")
    if above is not None and value <= above:
        raise InputError(f"--{name}={value}: expected more than {above}")
    if below is not None and value >= below:
        raise InputError(f"--{name}={value}: expected less than {below}")
    if at_most is not None and value > at_most:
        raise InputError(f"--{name}={value}: expected at most {at_most}")


def parse(argv: Sequence[str], program: str, settings: type[Settings]) -> Settings:
    """Reads the flags of a program.

    Args:
      argv: the program's name and its arguments.
      program: what stands behind `python -m`.
      settings: the dataclass of its flags.

    Returns:
      Valid settings, made by the class method `of_flags` where there is one. `--help` prints every
      flag and exits.

    Raises:
      InputError: an unknown flag, a value of the wrong type or out of its range, a stray argument.
    """
    # A set of our own: modules of tf-models define global flags under the same names.
    values = flags.FlagValues()
    for field in dataclasses.fields(settings):
        define, default = _DEFINE[type(field.default)], field.default
        if field.metadata["per_phase"]:
            define, default = flags.DEFINE_string, str(default)
        limits = field.metadata["limits"]
        text = field.metadata["help"]
        if field.metadata["per_phase"]:
            text += "; several phases: a comma-separated list"
        if "choices" in limits:
            text += f" ({', '.join(limits['choices'])})"
        define(field.name, default, text, flag_values=values, module_name="flags")
    if {"--help", "-h", "--helpfull", "-help"}.intersection(argv[1:]):
        about = importlib.import_module(program).__doc__ or ""
        print(f"{about.strip()}\n{values.get_help()}")
        sys.exit(0)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from None
    if rest:
        raise InputError(f"expected flags of the form --name=value. Received: {' '.join(rest)}")
    given = {}
    for field in dataclasses.fields(settings):
        if values[field.name].present:
            value = values[field.name].value
            given[field.name] = _list(field, value) if field.metadata["per_phase"] else value
    return getattr(settings, "of_flags", settings)(**given)


def _list(field: dataclasses.Field, text: str) -> tuple[Any, ...]:
    kind = type(field.default)
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(
            f"--{field.name}={text}: expected {what}, or a comma-separated list of them, one for each "
            "phase"
        ) from None
