"""The plots of a run's report, as SVG to be put into a page.

They are drawn without pyplot, so without a display or a backend of the user's choice, and the
same figures come out as the same bytes.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

Lines = Sequence[dict[str, Any]]
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE, RED = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#C1121F"
INK, FAINT = "#333333", "#DDDDDD"
STYLE = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.formatter.min_exponent": 4,  # 0.5, not 5 x 10^-1
    "grid.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
}
SIZE, TALL_SIZE = (7.0, 3.5), (7.0, 5.0)  # width and height in inches
FEW = 60  # points that are marked one by one
LOSSES = {"mlm_loss": ("masked LM", BLUE), "nsp_loss": ("next sentence", ORANGE), "loss": ("sum", INK)}  # fmt: skip
ACCURACIES = {"mlm_accuracy": ("masked LM", BLUE), "nsp_accuracy": ("next sentence", ORANGE)}
RATES = {
    "examples_per_sec": ("Examples a second", BLUE),
    "tokens_per_sec": ("Tokens a second, padding not counted", GREEN),
    "model_flops_utilization": ("Model FLOP utilisation on real tokens", PURPLE),
}
COUNTS = {
    "skipped_steps": "Updates skipped because a gradient was not finite",
    "corrupt_records": "Damaged records left out",
}


def svg(
    draw: Callable[[Figure], None], name: str, label: str, size: tuple[float, float] = SIZE
) -> str:
    """Returns a plot as an SVG element that fills the width it is given.

    Args:
      draw: puts it into an empty figure.
      name: unique in the page; begins the ids inside.
      label: what is to be seen, for those who do not see it.
      size: width and height in inches.
    """
    content = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(content, format="svg", dpi=150, metadata={"Date": None})
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    head = re.search(r'viewBox="[^"]+"', text)[0]
    opening = (
        f'<svg {head} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def column(lines: Lines, name: str) -> np.ndarray:
    """Returns one value of every line, NaN where there is none."""
    values = (line.get(name) for line in lines)
    return np.array([v if isinstance(v, int | float) else math.nan for v in values], float)


def draw_losses(figure: Figure, lines: Lines, held_out: Lines, starts: Sequence[int]) -> None:
    """Draws the losses of training and those on held-out records."""
    axes = figure.subplots()
    _both(axes, lines, held_out, LOSSES)
    _finish(axes, starts, "loss, nats", legend=True)


def draw_accuracies(figure: Figure, lines: Lines, held_out: Lines, starts: Sequence[int]) -> None:
    """Draws the accuracies of training and those on held-out records."""
    axes = figure.subplots()
    _both(axes, lines, held_out, ACCURACIES)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0.0)
    _finish(axes, starts, "accuracy", legend=True)


def draw_learning_rate(figure: Figure, lines: Lines, starts: Sequence[int]) -> None:
    """Draws the learning rate."""
    axes = figure.subplots()
    _line(axes, lines, "learning_rate", color=BLUE)
    axes.set_ylim(bottom=0.0)
    _finish(axes, starts, "learning rate")


def draw_gradient(figure: Figure, lines: Lines, starts: Sequence[int], clip: float) -> None:
    """Draws the norm of the gradient before it is clipped, 0 for never."""
    axes = figure.subplots()
    _line(axes, lines, "grad_norm", color=BLUE, label="before clipping")
    steps, norms = column(lines, "step"), column(lines, "grad_norm")
    if np.any(norms > 0):
        axes.set_yscale("log")
    if clip:
        axes.axhline(clip, color=ORANGE, linestyle="--", label=f"clipped to {clip:g}")
    bad = steps[np.isnan(norms)]
    if len(bad):
        axes.plot(
            bad,
            np.zeros(len(bad)),
            "x",
            color=RED,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label="not finite",
        )
    _finish(axes, starts, "global norm", legend=True)


def draw_rates(figure: Figure, lines: Lines, starts: Sequence[int]) -> None:
    """Draws how fast the run was, in those of three units that it knows."""
    known = rated(lines)
    for axes, name in zip(_stack(figure, len(known)), known, strict=True):
        title, color = RATES[name]
        _line(axes, lines, name, color=color)
        axes.set_title(title)
        axes.set_ylim(0.0, 1.3 * np.nanmax(column(lines, name)) or 1.0)
        if name == "model_flops_utilization":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        else:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _finish(axes, starts, "", last=name == known[-1])


def rated(lines: Lines) -> list[str]:
    """Returns the names of the rates that are known."""
    return [name for name in RATES if np.any(np.isfinite(column(lines, name)))]


def draw_counts(figure: Figure, lines: Lines, starts: Sequence[int]) -> None:
    """Draws what went wrong and was left out, as it adds up."""
    known = counted(lines)
    for axes, name in zip(_stack(figure, len(known)), known, strict=True):
        axes.step(column(lines, "step"), column(lines, name), where="post", color=RED)
        axes.set_title(COUNTS[name])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0.0, 1.3 * np.nanmax(column(lines, name)) or 1.0)
        _finish(axes, starts, "", last=name == known[-1])


def counted(lines: Lines) -> list[str]:
    """Returns the names of the counts of bad things of which there was at least one."""
    return [name for name in COUNTS if np.nansum(column(lines, name)) > 0]


def draw_spread(figure: Figure, steps: np.ndarray, values: np.ndarray, starts, unit: str) -> None:
    """Draws how values spread over the layers.

    Args:
      figure: an empty one.
      steps: [S].
      values: [S, layers]; NaN and what is not above zero are left out.
      starts: the steps at which later phases begin.
      unit: of the values.
    """
    axes = figure.subplots()
    known = np.where(values > 0, values, np.nan)
    some = np.isfinite(known).any(axis=1)
    if some.any():
        low, p10, middle, p90, high = np.nanpercentile(known[some], [0, 10, 50, 90, 100], axis=1)
        axes.fill_between(steps[some], low, high, color=BLUE, alpha=0.15, lw=0, label="all layers")
        axes.fill_between(steps[some], p10, p90, color=BLUE, alpha=0.3, lw=0, label="middle 80%")
        axes.plot(steps[some], middle, color=BLUE, label="median", marker=_marker(some.sum()))
        axes.set_yscale("log")
    _finish(axes, starts, unit, legend=True)


def heat_map_size(layers: int) -> tuple[float, float]:
    """Returns the size of a heat map in inches: every layer has a row with its name."""
    return 11.0, 1.3 + 0.13 * layers


def draw_heat_map(
    figure: Figure, steps: np.ndarray, values: np.ndarray, names: Sequence[str], starts, unit: str
) -> None:
    """Draws values of all layers in colour, on a logarithmic scale.

    Args:
      figure: an empty one of `heat_map_size`.
      steps: [S].
      values: [S, layers]; NaN and what is not above zero stay grey.
      names: of the layers, first at the top.
      starts: the steps at which later phases begin.
      unit: what the colours stand for.
    """
    axes = figure.subplots()
    axes.grid(False)
    axes.set_facecolor("#BBBBBB")
    known = np.ma.masked_where(~(values > 0), values).T
    between = (steps[1:] + steps[:-1]) / 2
    edges = [steps[0] - (between[0] - steps[0] if len(between) else 0.5), *between, steps[-1] + 0.5]
    look = {"norm": LogNorm(*_limits(known.compressed())), "cmap": "viridis", "rasterized": True}
    image = axes.pcolormesh(edges, np.arange(len(names) + 1), known, **look)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, top=True, labeltop=True)
    # Both are parts of the height, which grows with the layers.
    thin = {"fraction": 0.3 / figure.get_figheight(), "pad": 0.15 / figure.get_figheight()}
    bar = figure.colorbar(image, ax=axes, location="top", aspect=50, extend="both", **thin)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(which="both", labelsize=8)
    _finish(axes, starts, "", color="white", background="black")


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The range of the colours: a few layers far away do not take the contrast from the others."""
    if not len(values):
        return 0.1, 10.0
    low, high = np.percentile(values, [1, 99])
    return (low, high) if low < high else (low / 2, high * 2)


def _stack(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _both(axes: Axes, lines: Lines, held_out: Lines, kinds: dict[str, tuple[str, str]]) -> None:
    for name, (label, color) in kinds.items():
        _line(axes, lines, name, color=color, label=f"{label}, training", linewidth=1.2)
    for name, (label, color) in kinds.items():
        points = {"marker": "o", "markersize": 5 if len(held_out) <= FEW else 2, "linestyle": ":"}
        _line(axes, held_out, name, color=color, label=f"{label}, held out", **points)


def _line(axes: Axes, lines: Lines, name: str, **look: Any) -> None:
    values = column(lines, name)
    if np.any(np.isfinite(values)):
        look.setdefault("marker", _marker(len(values)))
        axes.plot(column(lines, "step"), values, **look)


def _marker(points: int) -> str:
    return "." if points <= FEW else ""


def _finish(
    axes: Axes,
    starts: Sequence[int],
    unit: str,
    *,
    legend: bool = False,
    last: bool = True,
    color: str = "#555555",
    background: str = "white",
) -> None:
    """Labels a plot and marks where a phase begins."""
    for number, step in zip(itertools.count(2), starts, strict=False):
        axes.axvline(step, color=color, linewidth=1.0, linestyle=(0, (5, 3)))
        text = axes.annotate(
            f"phase {number}",
            (step, 1.0),
            (3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=color,
            bbox={"facecolor": background, "alpha": 0.7, "linewidth": 0, "pad": 1},
        )
        text.set_in_layout(False)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if last:
        axes.set_xlabel("updates")
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
