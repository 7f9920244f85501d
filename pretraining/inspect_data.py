"""`python -m pretraining.inspect_data`: what a model will see of records, and whether they are sound."""

import dataclasses
import sys
from collections.abc import Sequence

from pretraining import program
from pretraining.errors import InputError
from pretraining.flags import check_limits, flag

FAULTS = 1  # exit status where a record does not fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """The flags of `python -m pretraining.inspect_data`."""

    input_files: str = flag(
        "", "records to look at: comma-separated files, globs or folders, local or gs://"
    )
    vocab_file: str = flag("", "WordPiece vocabulary of the records, a token a line")
    examples: int = flag(3, "how many examples to show", at_least=0)
    max_faults: int = flag(20, "how many faults to list; all are counted", at_least=1)
    seed: int = flag(1, "of the masks shown for records that come without", at_least=0)

    def __post_init__(self) -> None:
        check_limits(self)
        for name in ("input_files", "vocab_file"):
            if not getattr(self, name):
                raise InputError(f"--{name}: expected. Received: nothing")


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns 0, 1 where the data has a fault, 2 where a flag cannot work."""
    return program.run(argv, "pretraining.inspect_data", InspectConfig, _inspect)


def _inspect(config: InspectConfig) -> int:
    from pretraining import inspection

    return FAULTS if inspection.inspect(config) else 0


if __name__ == "__main__":
    program.leave(main(sys.argv))
