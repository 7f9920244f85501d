"""What an optimizer's update costs in memory traffic on a TPU, by the TPU's own compiler.

    python benchmarks/update_cost.py --slice=v3-8 --model=large

Compiles nothing but the update of all variables of a BERT, each optimizer by itself, and reports the
bytes per parameter that the compiled program reads and writes. No TPU is needed, and nothing runs.
"""

import argparse
import gc
import importlib.metadata
import os
import pathlib
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
from benchmarks.optimizer_step import bert_shapes
from benchmarks.report import progress
from tpu.chips import Slice, parse_slice
from tpu.compiler import compile_step

DECAY = {"weight_decay": 0.01}
CONTENDERS: dict[str, Callable] = {
    "lamb_tf LAMB": lambda: lamb_tf.keras2.LAMB(1e-3, **DECAY),
    "lamb_tf LAMB, bfloat16 moments": lambda: lamb_tf.keras2.LAMB(
        1e-3, **DECAY, moment_dtype="bfloat16"
    ),
    "lamb_tf LAMB, Keras 3": lambda: lamb_tf.keras3.LAMB(1e-3, **DECAY),
    "tf-models LAMB": lambda: tf_models.LAMB(1e-3, weight_decay_rate=0.01),
    "keras Lamb": lambda: keras.optimizers.Lamb(1e-3, **DECAY),
    "keras AdamW": lambda: keras.optimizers.AdamW(1e-3, **DECAY),
    "tf_keras AdamW": lambda: tf_keras.optimizers.AdamW(1e-3, **DECAY),
}
LAYERS = {"base": 12, "large": 24}
WIDENED = {768: 1024, 12: 16, 3072: 4096}  # from BERT-Base to BERT-Large
PACKAGES = ("tensorflow", "keras", "tf_keras", "tf-models-official", "jax", "libtpu")
COLUMNS = (
    "contender bytes_per_parameter argument_bytes_per_parameter in_place_bytes_per_parameter "
    "temporary_bytes compile_s slice model layers parameters tensorflow keras tf_keras "
    "tf-models-official jax libtpu lamb_tf machine command date"
).split()


def shapes_of(model: str, layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Returns name and shape of each variable of a BERT with both heads.

    Args:
      model: "base" or "large".
      layers: how many; 0 for as many as the model has.
    """
    shapes = bert_shapes(layers or LAYERS[model])
    if model == "base":
        return shapes
    return [(name, tuple(WIDENED.get(size, size) for size in shape)) for name, shape in shapes]


def update_of(
    optimizer, shapes: list[tuple[str, tuple[int, ...]]]
) -> tuple[Callable, list[tf.TensorSpec], list[tf.Variable]]:
    """Returns the update as a `tf.function`, its arguments, the gradients, and the variables.

    Args:
      optimizer: of either Keras, or a legacy one, which has no `build`.
      shapes: name and shape of each variable.
    """
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in shapes]
    (getattr(optimizer, "build", None) or optimizer._create_all_weights)(variables)

    @tf.function(jit_compile=True, autograph=False)
    def update(*gradients: tf.Tensor) -> None:
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    return update, [tf.TensorSpec(shape, tf.float32) for _, shape in shapes], variables


def measure(contender: str, shapes: list[tuple[str, tuple[int, ...]]], where: Slice) -> dict:
    """Returns what the compiled update of a contender costs.

    Args:
      contender: one of `CONTENDERS`.
      shapes: name and shape of each variable.
      where: the slice to compile for; every device does the same.
    """
    update, gradients, variables = update_of(CONTENDERS[contender](), shapes)
    parameters = sum(variable.shape.num_elements() for variable in variables)
    started = time.perf_counter()
    program = compile_step(update, gradients, where)
    return {
        "contender": contender,
        "bytes_per_parameter": round(program.bytes_accessed / parameters, 3),
        "argument_bytes_per_parameter": round(program.memory.arguments / parameters, 3),
        "in_place_bytes_per_parameter": round(program.memory.aliases / parameters, 3),
        "temporary_bytes": program.memory.temporaries,
        "compile_s": round(time.perf_counter() - started, 1),
        "parameters": parameters,
    }


def print_table(rows: list[dict]) -> None:
    """Prints the traffic, and beside it what cannot be avoided: arguments read, results written."""
    print(
        f"{'contender':<34}{'bytes/param':>12}{'in place':>10}{'temporary MB':>14}{'compile s':>11}"
    )
    for row in rows:
        print(
            f"{row['contender']:<34}{row['bytes_per_parameter']:>12.3f}"
            f"{row['in_place_bytes_per_parameter']:>10.3f}{row['temporary_bytes'] / 1e6:>14.2f}"
            f"{row['compile_s']:>11.1f}"
        )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slice", type=parse_slice, default=parse_slice("v3-8"))
    parser.add_argument("--model", choices=LAYERS, default="large")
    parser.add_argument("--layers", type=int, default=0, help="0: all; fewer to try out")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/...")
    arguments = parser.parse_args()
    shapes = shapes_of(arguments.model, arguments.layers)
    facts = {
        "slice": arguments.slice.name,
        "model": arguments.model,
        "layers": arguments.layers or LAYERS[arguments.model],
        **report.facts(PACKAGES),
    }
    rows = []
    for contender in arguments.contenders:
        rows.append({**measure(contender, shapes, arguments.slice), **facts})
        progress(f"{contender}: {rows[-1]['bytes_per_parameter']} bytes a parameter")
        gc.collect()  # variables and slots of BERT-Large are 4 GB
    print_table(rows)
    # It depends on the compiler and not on this machine.
    name = (
        f"update_cost-{arguments.slice.chip.name}-libtpu{importlib.metadata.version('libtpu')}.csv"
    )
    report.write_csv(arguments.output or report.RESULTS / name, rows, COLUMNS)


if __name__ == "__main__":
    main()
