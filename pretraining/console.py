"""What a run prints: lines of fact and a progress bar with rate and time left."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator

import tqdm

BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit} [{rate_noinv_fmt}, {remaining} left]{postfix}"
LOG_LINE = BAR.replace("{bar}", "{bar:20}") + "\n"

_silenced = []  # the standard output that `quiet` has set aside


def say(text: str = "") -> None:
    """Prints a line that stays on the screen, above a running progress bar."""
    stream = _silenced[0] if _silenced else sys.stdout
    if stream.isatty():
        tqdm.tqdm.write(text, file=stream)
    else:
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what libraries print, Orbit above all, which would tear the progress bar."""
    _silenced.append(sys.stdout)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            yield
    finally:
        _silenced.pop()


def progress(
    description: str,
    total: int,
    unit: str,
    start: int = 0,
    scale: bool = False,
    delay: float = 0.0,
):
    """Returns a `tqdm` bar on standard error: redrawn on a terminal, a line in 10 s in a log.

    Args:
      description: what is going on, in a word or two.
      total: how many units there are.
      unit: what is counted, with the space before it: "B", " steps".
      start: how many were done before.
      scale: show 1.2M instead of 1200000.
      delay: seconds before it appears, for what may be over by then.
    """
    terminal = sys.stderr.isatty()
    # A terminal that does not know its size, as in a container, would get no bar at all.
    columns, rows = shutil.get_terminal_size((100, 24))
    return tqdm.tqdm(
        desc=description,
        total=total,
        initial=start,
        unit=unit,
        unit_scale=scale,
        delay=delay,
        bar_format=BAR if terminal else LOG_LINE,
        mininterval=0.2 if terminal else 10.0,
        ncols=columns if terminal else None,
        nrows=rows if terminal else None,
        file=sys.stderr,
    )


@contextlib.contextmanager
def timed(description: str) -> Iterator[None]:
    """Says what begins, and afterwards how long it took."""
    started = time.monotonic()
    yield
    say(f"{description}: {time.monotonic() - started:.1f} s")


def leave_out(bar: tqdm.tqdm, count: int) -> None:
    """Counts units as done but leaves the time that they took, compilation say, out of the rate."""
    bar.n += count
    bar.initial = bar.last_print_n = bar.n
    bar.start_t = bar.last_print_t = time.time()
    bar.refresh()
