"""The tables of a run's report, whatever its files hold of what they should."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

Lines = Sequence[dict[str, Any]]
PERCENT = (
    "mlm_accuracy",
    "nsp_accuracy",
    "most_frequent_token_accuracy",
    "model_flops_utilization",
)


def result(summary: dict[str, Any], metrics: Lines, evaluations: Lines) -> str:
    """Shows what the run has reached: `summary.json`, or the last lines before there is one."""
    train = summary.get("train") or (metrics or [{}])[-1]
    held_out = summary.get("eval") or (evaluations or [{}])[-1]
    rows = [(k, train.get(k), held_out.get(k)) for k in {**train, **held_out} if k != "step"]
    tables = _table(["", "training, last loop", "held out"], rows, "Last figures")
    if summary.get("checkpoint"):
        checkpoint = html.escape(str(summary["checkpoint"]))
        tables = f"<p>Checkpoint: <code>{checkpoint}</code></p>" + tables
    if evaluations:
        keys = list({k: None for line in evaluations for k in line})
        rows = [[line.get(k) for k in keys] for line in evaluations]
        table = _table(keys, rows, "", by_column=keys)
        tables += f"<details><summary>All {len(rows)} evaluations</summary>{table}</details>"
    return tables


def plan(config: dict[str, Any]) -> str:
    """Shows the phases of a run and its batches, a column each."""
    parts = [config.get(name) for name in ("phases", "batch_plan", "plan")]
    lists = [part if isinstance(part, list) else [part] for part in parts if part]
    longest = max(map(len, lists), default=0)
    phases: list[dict[str, Any]] = [{} for _ in range(longest)]
    for items in lists:
        for phase, item in zip(phases, items, strict=False):
            phase.update(item if isinstance(item, dict) else {"plan": item})
    keys = {k: None for phase in phases for k in phase if k != "number"}
    rows = [(key, *(phase.get(key) for phase in phases)) for key in keys]
    heads = ["", *(f"phase {i + 1}" for i in range(longest))]
    recipe = config.get("recipe")
    about = recipe.values() if isinstance(recipe, dict) else [recipe] if recipe else []
    told = "".join(f"<p>{html.escape(str(text))}</p>" for text in about)
    return told + (_table(heads, rows) if rows else "<p>No plan was written.</p>")


def flags(config: dict[str, Any]) -> str:
    """Shows the flags, those first that make the run what it is."""
    given, identity = config.get("flags") or {}, config.get("identity") or {}
    fixed = [(f"--{k}", v) for k, v in given.items() if k in identity]
    free = [(f"--{k}", v) for k, v in given.items() if k not in identity]
    others = [(k, v) for k, v in identity.items() if not isinstance(v, dict) and k not in given]
    columns = [
        _table(["flag", "value"], fixed + others, "What makes this run what it is"),
        _table(["flag", "value"], free, "What may change at a restart"),
    ]
    for name, value in identity.items():
        if isinstance(value, dict):
            columns.append(_table(["", ""], list(value.items()), name.capitalize()))
    if not given:
        return "<p>No flags were written.</p>"
    return f'<div class="tables">{"".join(columns)}</div>'


def environment(config: dict[str, Any]) -> str:
    """Shows where the run took place, and the versions of what it used."""
    known = ("flags", "identity", "phases", "batch_plan", "plan", "recipe", "versions")
    rows = [(k, v) for k, v in config.items() if k not in known]
    rows += list((config.get("versions") or {}).items())
    return _table(["", ""], rows) if rows else "<p>Nothing was written about it.</p>"


def _table(
    heads: Iterable[str],
    rows: Iterable[Iterable[Any]],
    caption: str = "",
    by_column: list[str] | None = None,
) -> str:
    """Returns a table whose rows begin with what they are of; or columns, where `by_column` is."""
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    heads = list(heads)
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = ""
    for first, *rest in rows:
        names = by_column or [str(first)] * (1 + len(rest))
        cells = [shown(value, name) for value, name in zip(rest, names[1:], strict=True)]
        head = html.escape(str(first))
        body += f'<tr><th scope="row">{head}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>\n'
    top = f"<thead><tr>{top}</tr></thead>" if any(heads) else ""
    return f'<div class="scroll"><table>{told}{top}<tbody>{body}</tbody></table></div>\n'


def shown(value: Any, name: str = "") -> str:
    """Returns a value as text of the page: six digits, a percentage where the name says so."""
    if value is None or value == "":
        text = "-"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:.2%}" if name in PERCENT else f"{value:.6g}"
    elif isinstance(value, list) and not any(isinstance(part, dict | list) for part in value):
        text = ", ".join(map(str, value))
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return html.escape(text)
