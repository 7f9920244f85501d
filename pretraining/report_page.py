"""The page about a run: what `run_report` has read, as one piece of HTML that needs nothing else."""

import dataclasses
import functools
import html
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pretraining import report_plots as plots
from pretraining import report_tables as tables

CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; background: #fff; color: #1d2733;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.5rem 0 .8rem; font-size: 1.25rem;
  border-bottom: 1px solid #d5dbe1; padding-bottom: .2rem; }
p { margin: .4rem 0; } code { overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0; }
.facts div { border: 1px solid #d5dbe1; border-radius: .5rem; padding: .6rem 1rem; min-width: 9rem; }
.facts dt { font-size: .85rem; color: #4a5763; } .facts dd { margin: 0; font-size: 1.4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr));
  gap: 1.5rem; align-items: start; }
figure { margin: 0; } figcaption { font-weight: 600; } figcaption span { font-weight: 400;
  color: #4a5763; } svg { width: 100%; height: auto; display: block; }
figure.wide { max-width: 70rem; margin: 1rem 0; overflow-x: auto; } .wide svg { min-width: 56rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1.5rem 3rem; align-items: start; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; } caption { text-align: left; font-weight: 600; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #e6eaee;
  vertical-align: top; overflow-wrap: anywhere; } th { font-weight: 500; color: #4a5763; }
td { font-variant-numeric: tabular-nums; } summary { cursor: pointer; margin: .6rem 0; }
"""
# Nothing can come from elsewhere, whatever stands in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HEADLINES = {
    "Held-out masked-LM accuracy": "mlm_accuracy",
    "Held-out masked-LM loss": "mlm_loss",
    "Held-out next-sentence accuracy": "nsp_accuracy",
}
KINDS = {
    "trust_ratio": "Trust ratio",
    "param_norm": "Parameter norm",
    "update_norm": "Update norm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files of a run hold; empty where there is no such file.

    Attributes:
      path: of its folder.
      config: `config.json`.
      summary: `summary.json`, which stands at the end of the run only.
      metrics: a dict a line.
      evaluations: likewise.
      layers: likewise; the first one holds the names.
    """

    path: str
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    layers: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Updates that the page tells of."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        return self.summary.get("step") or last

    @property
    def phase_starts(self) -> list[int]:
        """The updates that came before each phase but the first, as far as the run has come."""
        planned = [p.get("first_step") for p in _dicts(self.config.get("phases"))]
        if all(isinstance(step, int) for step in planned) and planned:
            return [step for step in planned[1:] if step < self.step]
        pairs = zip(self.metrics, self.metrics[1:], strict=False)
        return [a["step"] for a, b in pairs if a.get("phase") != b.get("phase")]


def render(facts: Facts) -> str:
    """Returns the page; the same facts make the same page."""
    title = f"Run in {html.escape(facts.path)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>BERT pre-training</h1>
<p><code>{html.escape(facts.path)}</code></p>
{_headline(facts)}
</header>
<main>
<section><h2>Curves</h2>{_curves(facts)}</section>
<section><h2>Layers</h2>{_layers(facts)}</section>
<section><h2>Result</h2>{tables.result(facts.summary, facts.metrics, facts.evaluations)}</section>
<section><h2>Plan</h2>{tables.plan(facts.config)}</section>
<section><h2>Flags</h2>{tables.flags(facts.config)}</section>
<section><h2>Environment</h2>{tables.environment(facts.config)}</section>
</main>
</body>
</html>
"""


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _headline(facts: Facts) -> str:
    phases = _dicts(facts.config.get("phases"))
    total = sum(phase.get("num_train_steps", 0) for phase in phases)
    total = total or (facts.config.get("flags") or {}).get("num_train_steps")
    state = "Finished" if facts.summary else "Not finished when this page was written"
    held_out = facts.summary.get("eval") or (facts.evaluations or [{}])[-1]
    cards = {"Updates": f"{facts.step:,}" + (f" of {total:,}" if isinstance(total, int) else "")}
    for title, name in HEADLINES.items():
        value = held_out.get(name)
        cards[title] = tables.shown(round(value, 4) if isinstance(value, float) else value, name)
    token = held_out.get("most_frequent_token")
    if token is not None:
        name = "most_frequent_token_accuracy"
        cards[f"Always guessing “{token}”"] = tables.shown(held_out.get(name), name)
    shown = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{v}</dd></div>" for k, v in cards.items())
    return f'<p>{state}.</p>\n<dl class="facts">{shown}</dl>'


def _curves(facts: Facts) -> str:
    lines, held_out, starts = facts.metrics, facts.evaluations, facts.phase_starts
    if not (lines or held_out):
        return "<p>No metrics were written.</p>"
    clip = (facts.config.get("flags") or {}).get("clip_global_norm")
    clip = clip if isinstance(clip, float | int) else 0.0
    drawn = [
        ("Losses", "of training, a mean over a loop on the device; dots: held-out records",
         functools.partial(plots.draw_losses, lines=lines, held_out=held_out, starts=starts)),
        ("Accuracies", "likewise, of what was to be predicted",
         functools.partial(plots.draw_accuracies, lines=lines, held_out=held_out, starts=starts)),
        ("Learning rate", "of the update made last",
         functools.partial(plots.draw_learning_rate, lines=lines, starts=starts)),
        ("Gradient norm", "of the update made last, logarithmic",
         functools.partial(plots.draw_gradient, lines=lines, starts=starts, clip=clip)),
    ]  # fmt: skip
    if plots.rated(lines):
        draw = functools.partial(plots.draw_rates, lines=lines, starts=starts)
        drawn.append(("Throughput", "evaluations and checkpoints not counted", draw))
    if plots.counted(lines):
        draw = functools.partial(plots.draw_counts, lines=lines, starts=starts)
        drawn.append(("Left out", "added up over the run", draw))
    sizes = {"Throughput": plots.TALL_SIZE}
    shown = [_figure(*plot, sizes.get(plot[0], plots.SIZE)) for plot in drawn]
    return f'<div class="plots">{"".join(shown)}</div>'


def _figure(
    title: str,
    note: str,
    draw: Callable[[Figure], None],
    size: tuple[float, float] = plots.SIZE,
    style: str = "",
) -> str:
    name = title.lower().replace(" ", "-")
    picture = plots.svg(draw, name, f"{title} over the updates", size)
    caption = f"<figcaption>{title} <span>{note}</span></figcaption>"
    return f'<figure{style} id="{name}">{caption}{picture}</figure>\n'


def _layers(facts: Facts) -> str:
    lines = [line for line in facts.layers if isinstance(line.get("trust_ratio"), list)]
    if not lines:
        return "<p>No figures of single layers were written.</p>"
    count = max(len(line["trust_ratio"]) for line in lines)
    names = _names(facts.layers, count)
    steps, starts = plots.column(lines, "step"), facts.phase_starts
    spreads, maps, told = [], [], ""
    for kind, title in KINDS.items():
        values = np.array([_row(line.get(kind), count) for line in lines])
        shown = np.ones(count, bool)
        if kind == "trust_ratio" and np.any(still := np.all(values == 1.0, axis=0)):
            shown = ~still if not still.all() else shown
            told = _told_of_the_others(names[~shown])
        given = {
            "steps": steps,
            "values": values[:, shown],
            "starts": starts,
            "unit": title.lower(),
        }
        spread = functools.partial(plots.draw_spread, **given)
        spreads.append(_figure(f"{title} over all layers", "logarithmic", spread))
        draw = functools.partial(plots.draw_heat_map, names=names[shown], **given)
        note = f"{shown.sum()} variables of the model; logarithmic; grey: none or zero"
        size = plots.heat_map_size(shown.sum())
        maps.append(_figure(f"{title} by layer", note, draw, size, ' class="wide"'))
    others = "".join(
        f"<details><summary>{title} by layer</summary>{picture}</details>"
        for title, picture in zip(list(KINDS.values())[1:], maps[1:], strict=True)
    )
    return f'{maps[0]}{told}<div class="plots">{"".join(spreads)}</div>{others}'


def _told_of_the_others(names: Iterable[str]) -> str:
    """Lists the variables that have no row among the trust ratios."""
    listed = ", ".join(f"<code>{html.escape(name)}</code>" for name in names)
    if not listed:
        return ""
    return (
        "<details><summary>Variables whose trust ratio is 1 at every step, because they are not "
        f"adapted, are left out above</summary><p>{listed}</p></details>"
    )


def _names(lines: list[dict[str, Any]], count: int) -> np.ndarray:
    given = [line["names"] for line in lines if isinstance(line.get("names"), list)]
    names = _short([str(name) for name in given[0]]) if given else []
    return np.array([*names, *(f"layer {i}" for i in range(len(names), count))][:count])


def _short(names: list[str]) -> list[str]:
    """Leaves out the beginning that all names share."""
    parts = [name.removesuffix(":0").split("/") for name in names]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def _row(values: Any, count: int) -> list[float]:
    values = values if isinstance(values, list) else []
    known = [v if isinstance(v, int | float) else np.nan for v in values][:count]
    return known + [np.nan] * (count - len(known))
