"""What one optimizer step costs over the variables of BERT: LAMB beside its peers and AdamW.

    python benchmarks/optimizer_step.py --rounds=20 --measure_memory

All contenders share the variables and one process; each round steps every one of them once, in
another order, so that a slow minute of the machine hits all alike. First calls (tracing and
compilation) are timed apart. Writes a CSV and prints a table.
"""

import argparse
import gc
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # measures this checkout

import keras
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lamb as tf_models

import lamb_tf
from benchmarks import report
from benchmarks.report import progress

MODES = ("eager", "function", "xla")
# Keyword arguments at their defaults: tf_keras compiles its updates where there is a GPU.
CONTENDERS = {
    "lamb_tf keras3": lambda: lamb_tf.keras3.LAMB(1e-3, weight_decay=0.01),
    "lamb_tf keras2": lambda: lamb_tf.keras2.LAMB(1e-3, weight_decay=0.01),
    "tf-models LAMB": lambda: tf_models.LAMB(1e-3, weight_decay_rate=0.01),
    "keras Lamb": lambda: keras.optimizers.Lamb(1e-3, weight_decay=0.01),
    "keras AdamW": lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.01),
    "tf_keras AdamW": lambda: tf_keras.optimizers.AdamW(1e-3, weight_decay=0.01),
}
LAMB_PEERS = ("tf-models LAMB", "keras Lamb")
PACKAGES = ("tensorflow", "keras", "tf_keras", "tf-models-official")
COLUMNS = (
    "contender mode first_call_s step_median_ms step_min_ms rounds peak_memory_mb parameters "
    "tensorflow keras tf_keras tf-models-official lamb_tf machine command date"
).split()


def bert_shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Returns name and shape of each variable of BERT-Base (`layers` = 12) with both heads."""
    norm = [("gamma", (768,)), ("beta", (768,))]
    layer = [
        *((f"{name}/kernel", (768, 12, 64)) for name in ("query", "key", "value")),
        *((f"{name}/bias", (12, 64)) for name in ("query", "key", "value")),
        *(("attention_output/kernel", (12, 64, 768)), ("attention_output/bias", (768,))),
        *((f"attention_layer_norm/{name}", shape) for name, shape in norm),
        *(("intermediate/kernel", (768, 3072)), ("intermediate/bias", (3072,))),
        *(("output/kernel", (3072, 768)), ("output/bias", (768,))),
        *((f"output_layer_norm/{name}", shape) for name, shape in norm),
    ]
    return [
        ("word_embeddings/embeddings", (30522, 768)),
        ("position_embeddings/embeddings", (512, 768)),
        ("type_embeddings/embeddings", (2, 768)),
        *((f"embeddings/layer_norm/{name}", shape) for name, shape in norm),
        *((f"layer_{i}/{name}", shape) for i in range(layers) for name, shape in layer),
        *(("pooler/kernel", (768, 768)), ("pooler/bias", (768,))),
        *(("masked_lm/transform/kernel", (768, 768)), ("masked_lm/transform/bias", (768,))),
        *((f"masked_lm/layer_norm/{name}", shape) for name, shape in norm),
        ("masked_lm/output_bias/bias", (30522,)),
        *(("next_sentence/kernel", (768, 2)), ("next_sentence/bias", (2,))),
    ]


def make_variables(layers: int) -> tuple[list[tf.Tensor], list[tf.Variable]]:
    """Returns gradients and the variables that they belong to, normal at BERT's scale."""
    make = tf.random.Generator.from_seed(1).normal
    shapes = bert_shapes(layers)
    variables = [tf.Variable(make(shape, stddev=0.02), name=name) for name, shape in shapes]
    return [make(shape, stddev=1e-3) for _, shape in shapes], variables


class Step:
    """One optimizer in one mode, ready to be stepped."""

    def __init__(self, contender: str, mode: str, gradients: list, variables: list):
        optimizer = CONTENDERS[contender]()

        def apply(gradients: list) -> None:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        # Moments are no part of the first call; tf-models' LAMB, a legacy optimizer, has no `build`.
        (getattr(optimizer, "build", None) or optimizer._create_all_weights)(variables)
        if mode != "eager":
            apply = tf.function(apply, jit_compile=mode == "xla" or None, autograph=False)
        self._apply: Callable[[list], None] = apply
        self._gradients, self._last = gradients, variables[-1]

    def seconds(self) -> float:
        """Steps once and returns how long that took."""
        start = time.perf_counter()
        self._apply(self._gradients)
        float(self._last[(0,) * self._last.shape.rank])  # the step has run when this can be read
        return time.perf_counter() - start


def measure(pairs: list[tuple[str, str]], arguments: argparse.Namespace) -> list[dict]:
    """Returns a row for each (contender, mode); those that fail are reported and left out."""
    gradients, variables = make_variables(arguments.layers)
    steps: dict[tuple[str, str], Step] = {}
    first: dict[tuple[str, str], float] = {}
    times: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        try:
            steps[pair] = Step(*pair, gradients, variables)
            first[pair], times[pair] = steps[pair].seconds(), []
            progress(f"{pair}: first call {first[pair]:.2f} s")
        except Exception as error:  # one contender that cannot run must not cost the others' hour
            steps.pop(pair, None)
            progress(f"{pair}: failed: {type(error).__name__}: {str(error)[:300]}")
    order = random.Random(0)
    for number in range(-1, arguments.rounds):
        for pair in order.sample(list(steps), len(steps)):
            seconds = steps[pair].seconds()
            if number >= 0:  # the round before is a warm-up
                times[pair].append(1000 * seconds)
        progress(f"round {number + 1} of {arguments.rounds}")
    return [
        {
            "contender": pair[0],
            "mode": pair[1],
            "first_call_s": round(first[pair], 3),
            "step_median_ms": round(statistics.median(times[pair]), 3),
            "step_min_ms": round(min(times[pair]), 3),
            "rounds": arguments.rounds,
        }
        for pair in steps
    ]


def memory_mb() -> tuple[float, float]:
    """Returns the memory held now and the most that was held: the GPU's, else this process'."""
    if tf.config.list_logical_devices("GPU"):
        info = tf.config.experimental.get_memory_info("GPU:0")
        return info["current"] / 2**20, info["peak"] / 2**20
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize() / 2**20, peak / 2**10


def print_memory(contender: str, mode: str, layers: int) -> None:
    """Prints how many MB building an optimizer and three steps take at the most."""
    gradients, variables = make_variables(layers)
    before, _ = memory_mb()
    step = Step(contender, mode, gradients, variables)
    for _ in range(3):
        step.seconds()
    print(round(memory_mb()[1] - before, 1))


def memory_of(row: dict, arguments: argparse.Namespace) -> str:
    """Returns what `print_memory` says in a process of its own, "" where that fails."""
    progress(f"{row['mode']}: {row['contender']}: memory")
    pair = f"--memory={row['contender']}:{row['mode']}"
    command = [sys.executable, __file__, pair, f"--layers={arguments.layers}"]
    command += [f"--device={arguments.device}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return result.stdout.strip().splitlines()[-1] if result.returncode == 0 else ""


def print_table(rows: list[dict]) -> None:
    """Prints the times, and their ratios to the faster LAMB peer and to AdamW, both under XLA."""
    medians = {(row["contender"], row["mode"]): row["step_median_ms"] for row in rows}
    peers = [medians[name, "xla"] for name in LAMB_PEERS if (name, "xla") in medians]
    peer, adamw = min(peers, default=None), medians.get(("keras AdamW", "xla"))
    print(
        f"{'contender':<16}{'mode':<10}{'first s':>9}{'median ms':>11}{'min ms':>9}"
        f"{'/ peer':>8}{'/ AdamW':>9}{'peak MB':>10}"
    )
    for row in rows:
        ratios = [f"{row['step_median_ms'] / base:.2f}" if base else "-" for base in (peer, adamw)]
        print(
            f"{row['contender']:<16}{row['mode']:<10}{row['first_call_s']:>9.2f}"
            f"{row['step_median_ms']:>11.1f}{row['step_min_ms']:>9.1f}"
            f"{ratios[0]:>8}{ratios[1]:>9}{row.get('peak_memory_mb', ''):>10}"
        )
    print("peer: the faster of tf-models LAMB and keras Lamb, AdamW: keras AdamW, both in mode xla")


def parse_arguments() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--layers", type=int, default=12, help="12 is BERT-Base; fewer to try out")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--measure_memory", action="store_true")
    parser.add_argument("--memory", metavar="CONTENDER:MODE", help="print the peak of one and exit")
    parser.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/...")
    arguments = parser.parse_args()
    arguments.modes = arguments.modes.split(",")
    arguments.contenders = arguments.contenders.split(",")
    if unknown := {*arguments.modes} - {*MODES} | {*arguments.contenders} - {*CONTENDERS}:
        parser.error(f"unknown: {sorted(unknown)}; there are {list(MODES)} and {list(CONTENDERS)}")
    return arguments


def main() -> None:
    """Runs the benchmark."""
    arguments = parse_arguments()
    tf.get_logger().setLevel("ERROR")  # each contender is traced anew, which TensorFlow warns of
    if arguments.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    if arguments.device == "gpu" and not tf.config.list_physical_devices("GPU"):
        sys.exit("--device=gpu: TensorFlow sees no GPU")
    if arguments.memory:
        contender, mode = arguments.memory.split(":")
        print_memory(contender, mode, arguments.layers)
        return
    parameters = sum(
        tf.TensorShape(shape).num_elements() for _, shape in bert_shapes(arguments.layers)
    )
    print(f"{parameters:,} parameters in {len(bert_shapes(arguments.layers))} variables")
    facts = {"parameters": parameters, **report.facts(PACKAGES)}
    rows = []
    # Eager steps take seconds; the others, whose ratios matter, take turns with one another.
    for group in (("eager",), ("function", "xla")):
        pairs = [(c, m) for m in group if m in arguments.modes for c in arguments.contenders]
        rows += measure(pairs, arguments)
        gc.collect()  # each optimizer holds 0.9 GB
    for row in rows:
        row["peak_memory_mb"] = memory_of(row, arguments) if arguments.measure_memory else ""
        row.update(facts)
    print_table(rows)
    report.write_csv(arguments.output or report.default_path("optimizer_step"), rows, COLUMNS)


if __name__ == "__main__":
    main()
