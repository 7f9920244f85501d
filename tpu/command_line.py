"""How the programs of this package take their flags: what cannot work is answered in one line."""

import argparse
import sys
from typing import NoReturn

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """An argument parser that neither guesses abbreviations nor prints its usage with an error."""

    def __init__(self, **settings):
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Prints one line and ends the program with status 2."""
        sys.stderr.write(f"error: {' '.join(message.split())}. See {self.prog} --help\n")
        sys.exit(USAGE_ERROR)
