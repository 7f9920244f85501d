"""`python -m pretraining.run`: BERT pre-training with LAMB, from flags to a summary."""

import sys
from collections.abc import Sequence

from pretraining import program
from pretraining.config import Config


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status, 2 where something given cannot work."""
    return program.run(argv, "pretraining.run", Config, _train)


def _train(config: Config) -> int:
    from pretraining import training

    return training.run(config)


if __name__ == "__main__":
    program.leave(main(sys.argv))
