"""The one kind of failure that is the user's to mend."""


class InputError(ValueError):
    """Something given on the command line cannot work.

    The text is a single line: which flag or file, what was expected, what came. `run` prints it
    without a traceback and exits with status 2.
    """


class DeviceLost(RuntimeError):
    """The TPU of a run is gone; the text is one line. The run may be started again."""
