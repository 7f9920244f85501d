"""The page about a run: all there, nothing from elsewhere, and what it draws is what was written."""

import base64
import collections
import html.parser
import io
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import warnings

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf

from pretraining import run_report
from pretraining.errors import InputError
from pretraining.run_directory import RunDirectory
from tests.gcs_server import ROOT, gcs  # noqa: F401

STEPS = list(range(10, 210, 10))
LAYERS = [
    "bert/embeddings/word",
    "bert/layer_0/query/kernel",
    "bert/layer_0/key/kernel",
    "bert/layer_0/query/bias",  # not adapted
]
BAD, ZERO = 70, 150  # the step without a finite gradient; the one with a ratio of zero
NASTY = '<script src="https://example.com/x.js">alert("x")</script>&amp;'


def ratio(layer, step):
    if (layer, step) == (1, BAD):
        return None
    if layer == 3:
        return 1.0
    return 0.0 if (layer, step) == (1, ZERO) else 10.0 ** (layer - 1) * (1 + step / 400)


def metrics(step):
    phase = 1 if step <= 100 else 2
    return {
        "step": step,
        "loss": 9.0 - step / 50,
        "mlm_loss": 8.0 - step / 50,
        "nsp_loss": 1.0,
        "mlm_accuracy": step / 1000,
        "nsp_accuracy": 0.5 + step / 1000,
        "learning_rate": 0.01 * (step % 100) / 100,
        "grad_norm": None if step == BAD else 1.0 + step / 100,
        "examples_per_sec": 100.0 + step,
        "tokens_per_sec": 9000.0 + step,
        "model_flops_utilization": 0.3,
        "skipped_steps": int(step >= BAD),
        "phase": phase,
    }


def evaluation(step):
    names = ("step", "loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "phase")
    return {name: metrics(step)[name] for name in names}


def write_run(folder):
    """The files that a run of two phases leaves."""
    folder.mkdir(exist_ok=True)
    layers = [{"step": 0, "names": LAYERS}]
    for step in STEPS:
        ratios = [ratio(i, step) for i in range(4)]
        layers.append(
            {
                "step": step,
                "param_norm": [1.0, 2.0, 3.0, 4.0],
                "update_norm": [1.0, None, 0.5, 1e-9],
                "trust_ratio": ratios,
            }
        )
    for name, lines in (
        ("metrics", [metrics(step) for step in STEPS]),
        ("evaluations", [evaluation(step) for step in (50, 100, 150, 200)]),
        ("layers", layers),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    phases = [
        {
            "number": n,
            "first_step": 100 * (n - 1),
            "num_train_steps": 100,
            "max_seq_length": 128 * n,
        }
        for n in (1, 2)
    ]
    config = {
        "flags": {"seed": 1, "input_files": NASTY, "clip_global_norm": 1.0, "learning_rate": [0.01, 0.02]},
        "identity": {"seed": 1, "model": {"hidden_size": 128}, "vocab_file": "abc123"},
        "batch_plan": [{"global_batch_size": 32, "num_replicas": 2}] * 2,
        "phases": phases,
        "strategy": "2 replicas on CPU",
        "versions": {"python": "3.11.7", "tensorflow": "2.20.0"},
    }  # fmt: skip
    held_out = {
        **evaluation(200),
        "most_frequent_token": "the",
        "most_frequent_token_accuracy": 0.05,
    }
    summary = {"step": 200, "checkpoint": "x/ckpt-200", "train": metrics(200), "eval": held_out}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = run_report.write_report(RunDirectory(str(folder)))
    assert path == f"{folder}/report.html"
    return (folder / "report.html").read_text()


class Elements(html.parser.HTMLParser):
    """Reads a page: its elements, its text; that what is opened is closed, in order."""

    VOID = ("meta", "br", "path", "use", "rect", "image", "line", "circle", "stop")

    def __init__(self, content):
        super().__init__()
        self.found, self.text, self.open = [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def figure(page, name):
    return re.search(rf'<figure[^>]* id="{name}">.*?</figure>', page, re.DOTALL)[0]


def drawn_lines(page, name, color):
    """The points of the lines of a colour in a plot, [[x, y], ...] each, in units of the picture."""
    paths = re.findall(
        rf'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke(?:-dasharray: [^;]+; stroke-dashoffset: 0; stroke)?: {color}',
        figure(page, name),
    )
    return [
        np.array([p.split()[1:] for p in re.findall(r"[ML] [-\d.]+ [-\d.]+", path)], float)
        for path in paths
    ]


def assert_affine(shown, values):
    """The picture is the values, but for where zero stands and how long a unit is."""
    slope, offset = np.polyfit(values, shown, 1)
    np.testing.assert_allclose(slope * np.asarray(values) + offset, shown, atol=0.01)
    return slope


def test_the_page_is_whole_and_needs_nothing_else(page):
    elements = Elements(page)
    counts = collections.Counter(tag for tag, _ in elements.found)
    assert not {"script", "link", "iframe", "object", "base"} & set(counts)
    for tag, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), tag
    assert set(re.findall(r"url\((.)", page)) == {"#"} and "@import" not in page
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert targets and {one or other for one, other in targets} <= set(ids)
    pictures = [attributes for tag, attributes in elements.found if tag == "svg"]
    assert all(p["role"] == "img" and p["aria-label"] and "width" not in p for p in pictures)
    assert counts["svg"] == counts["figure"] == counts["figcaption"] == 12
    assert counts["h1"] == 1 and page.startswith('<!DOCTYPE html>\n<html lang="en">')


def test_what_was_written_is_told(page):
    text = " ".join(" ".join(Elements(page).text).split())
    for told in (
        "Updates 200 of 200",
        "Held-out masked-LM accuracy 20.00%",
        "Always guessing “the” 5.00%",
        "phase 2",
        "left out above layer_0/query/bias",
        "--learning_rate 0.01, 0.02",
        "hidden_size 128",
        "vocab_file abc123",
        "global_batch_size 32 32",
        "max_seq_length 128 256",
        "strategy 2 replicas on CPU",
        "tensorflow 2.20.0",
        "mlm_loss 4 4",
        "All 4 evaluations",
        NASTY,
    ):
        assert told in text, told


def test_layers_stand_in_order_and_those_that_are_not_adapted_apart(page):
    short = [name.removeprefix("bert/") for name in LAYERS]
    for name, expected in (("trust-ratio", short[:3]), ("update-norm", short)):
        shown = re.findall(r"<text[^>]*>([^<]*/[^<]*)</text>", figure(page, f"{name}-by-layer"))
        assert shown == expected


def test_curves_are_what_was_written(page):
    blue, orange, ink = "#0072b2", "#d55e00", "#333333"
    for name, color, values in (
        ("losses", blue, [metrics(s)["mlm_loss"] for s in STEPS]),
        ("losses", ink, [metrics(s)["loss"] for s in STEPS]),
        ("accuracies", orange, [metrics(s)["nsp_accuracy"] for s in STEPS]),
        ("learning-rate", blue, [metrics(s)["learning_rate"] for s in STEPS]),
        ("throughput", blue, [metrics(s)["examples_per_sec"] for s in STEPS]),
        ("throughput", "#009e73", [metrics(s)["tokens_per_sec"] for s in STEPS]),
    ):
        line = max(drawn_lines(page, name, color), key=len)
        if len(line) < len(STEPS):  # points on a straight line may be left out
            values = np.interp(np.interp(line[:, 0], line[[0, -1], 0], [10, 200]), STEPS, values)
        assert assert_affine(line[:, 1], values) < 0  # the picture's y axis points down
    held_out = [line for line in drawn_lines(page, "losses", blue) if len(line) == 4]
    assert len(held_out) == 1
    # A gap where the gradient is not finite, and a cross.
    norms = "".join(
        re.findall(rf'<path d="([^"]+)" clip[^>]+{blue}', figure(page, "gradient-norm"))
    )
    assert norms.count("M") == 2 and "not finite" in figure(page, "gradient-norm")
    assert "skipped" in figure(page, "left-out")


def test_the_heat_map_has_the_colours_of_the_ratios(page):
    pictures = re.findall(
        r'<image xlink:href="data:image/png;base64,\s*([^"]+)"([^>]*)',
        figure(page, "trust-ratio-by-layer"),
    )
    assert all("scale(1 -1)" in attributes for _, attributes in pictures)  # stored upside down
    image = max(
        (
            matplotlib.image.imread(io.BytesIO(base64.b64decode(content)), format="png")[::-1]
            for content, _ in pictures
        ),
        key=lambda image: image.size,
    )
    rows, columns = image.shape[:2]
    known = [r for s in STEPS for i in range(3) if (r := ratio(i, s))]
    low, high = np.log(np.percentile(known, [1, 99]))
    for i in range(3):
        for j, step in enumerate(STEPS):
            # The last column is drawn up to its step only.
            x = columns * (step - 5 + 2) / (STEPS[-1] + 0.5 - 5)
            color = image[int((i + 0.5) * rows / 3), int(min(x, columns - 2))][:3]
            value = ratio(i, step)
            if not value:
                assert np.ptp(color) < 0.01, (i, j)  # grey
                continue
            expected = matplotlib.colormaps["viridis"]((np.log(value) - low) / (high - low))[:3]
            np.testing.assert_allclose(color, expected, atol=0.03, err_msg=f"{i} {step}")


BARE = {
    "nothing but flags": ({"flags": {}, "identity": {}}, [], [], []),
    "no configuration": (None, [{"step": 1, "loss": 1.0}], [], []),
    "one line": (
        {"flags": {"num_train_steps": 5}, "identity": {}},
        [metrics(10)],
        [evaluation(10)],
        [{"step": 10, "trust_ratio": [1.0]}],
    ),
    "nothing but null": (
        {"flags": {}, "identity": {}, "batch_plan": {"global_batch_size": 32}, "plan": "x"},
        [{k: v if k == "step" else None for k, v in metrics(s).items()} for s in STEPS],
        [{"step": 10, "mlm_loss": None}],
        [{"step": 0, "names": LAYERS}, {"step": 10, "trust_ratio": [None] * 3}],
    ),
    "zeros": (
        {"flags": {"clip_global_norm": 0.0}, "identity": {}, "phases": None, "versions": None},
        [{k: v if k == "step" else 0 for k, v in metrics(s).items()} for s in STEPS],
        [],
        [{"step": s, "trust_ratio": [0.0, 1.0], "param_norm": [0.0] * 2} for s in (10, 20)],
    ),
}


@pytest.mark.parametrize("files", BARE.values(), ids=BARE)
def test_whatever_is_missing_there_is_a_page_and_no_warning(tmp_path, files):
    config, *logs = files
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for name, lines in zip(("metrics", "evaluations", "layers"), logs, strict=True):
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"{name}.jsonl").write_text(text + '{"step": 99, "lo')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = run_report.write_report(RunDirectory(str(tmp_path)))
    elements = Elements(pathlib.Path(path).read_text())
    assert any("Not finished" in text for text in elements.text)
    assert [tag for tag, _ in elements.found].count("h2") == 6


def test_the_program_and_its_errors(tmp_path, capsys):
    write_run(tmp_path / "run")
    for name in ("metrics", "evaluations", "layers"):
        (tmp_path / f"run/{name}.jsonl").unlink()
    arguments = ["run_report", f"--output_dir={tmp_path}/run"]
    assert run_report.main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run/report.html\n"
    for flag, told in (
        (f"--output_dir={tmp_path}", "expected the folder of a run"),
        (f"--output_dir={tmp_path}/none", "expected the folder of a run"),
        ("--output_dir=", "expected a folder"),
        ("--color=red", "color"),
    ):
        assert run_report.main(["run_report", flag]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and told in printed.err and printed.err.count("\n") == 1
    before = (tmp_path / "run/report.html").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # plays the full disk
    try:
        with pytest.raises(InputError, match=r"report\.html cannot be written"):
            run_report.write_report(RunDirectory(f"{tmp_path}/run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run/report.html").read_text() == before


def test_a_run_on_gs(gcs, tmp_path):  # noqa: F811
    write_run(tmp_path)
    for name in ("config.json", "evaluations.jsonl"):
        tf.io.gfile.copy(str(tmp_path / name), f"{gcs.bucket}/run/{name}")
    tf.io.gfile.copy(
        str(tmp_path / "metrics.jsonl"), f"{gcs.bucket}/run/metrics.jsonl.parts/0000000010.jsonl"
    )
    path = run_report.write_report(RunDirectory(f"{gcs.bucket}/run/"))
    assert path == f"{gcs.bucket}/run/report.html"
    assert 'id="losses"' in gcs.content(path).decode()


def test_another_process_without_a_home_makes_the_same_page_and_prints_nothing(page, tmp_path):
    """Matplotlib warns of a home that cannot be written to, and is told of a backend it lacks."""
    folder = re.search(r"<code>(.*?)</code>", page)[1]
    program = f"""
import json, pathlib
from pretraining import run_report, report_page
folder = pathlib.Path({folder!r})
facts = {{name: json.loads((folder / f"{{name}}.json").read_text()) for name in ("config", "summary")}}
for name in ("metrics", "evaluations", "layers"):
    facts[name] = [json.loads(line) for line in (folder / f"{{name}}.jsonl").open()]
page = report_page.render(report_page.Facts(path=str(folder), **facts))
pathlib.Path({str(tmp_path)!r}, "page").write_text(page)
"""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/proc/no/home",
        "MPLBACKEND": "TkAgg",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "page").read_text() == page
