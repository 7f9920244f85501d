"""Programs that libtpu's compiler makes on this machine, and what is read from them."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import tensorflow as tf

from tpu import compiler, hlo
from tpu.chips import parse_slice
from tpu.preflight import StepError, preflight

V3, V5E = parse_slice("v3-8"), parse_slice("v5litepod-4")
ROWS, WIDTH, LOOPS = 64, 256, 3


def make_step(where, sum_in_loop=False, average=None):
    """A step of two layers with micro-batches in a loop, one sum over devices, an update or none."""
    weights = [tf.Variable(tf.ones([WIDTH, WIDTH])) for _ in range(2)]
    moments = [tf.Variable(tf.zeros([WIDTH, WIDTH])) for _ in range(2)]
    average = average or compiler.cross_replica_sum(where)

    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.tanh(tf.tanh(x @ weights[0]) @ weights[1]))
        return tape.gradient(loss, weights)

    def step(x):
        def add(i, totals):
            found = gradients(x[i])
            found = average(found) if sum_in_loop else found
            return i + 1, [a + b for a, b in zip(totals, found, strict=True)]

        zeros = [tf.zeros_like(w) for w in weights]
        _, totals = tf.while_loop(lambda i, _: i < LOOPS, add, (0, zeros))
        totals = totals if sum_in_loop else average(totals)

        def update():
            with tf.name_scope("the_update"):
                for weight, moment, total in zip(weights, moments, totals, strict=True):
                    moment.assign(0.9 * moment + 0.1 * total)
                    weight.assign_sub(0.1 * moment)
            return True

        return tf.cond(tf.math.is_finite(tf.reduce_sum(totals[0])), update, lambda: False)

    return step, [*weights, *moments]


ARGUMENTS = [tf.TensorSpec([LOOPS, ROWS, WIDTH])]
# Forward two products, backward three: the input needs no gradient.
FLOPS = LOOPS * 5 * 2 * ROWS * WIDTH**2
SIZE = WIDTH * WIDTH * 4


def check(step, where, variables):
    return preflight(
        step,
        ARGUMENTS,
        where,
        variables=variables,
        model_flops=FLOPS,
        update_scope="the_update/",
    )()


@pytest.fixture(scope="module")
def report():
    step, variables = make_step(V3)
    return check(step, V3, variables)


def test_a_loop_counts_as_often_as_it_runs(report):
    assert report.program.matmul_flops == FLOPS
    assert report.flops_ratio == 1.0
    assert report.program.flops >= FLOPS


def test_variables_are_updated_in_place(report):
    assert report.in_place_bytes == report.state_bytes == 4 * SIZE
    assert report.program.in_place_sizes == [SIZE] * 4
    memory = report.program.memory
    assert memory.aliases == 4 * SIZE  # 256 x 256 fills its tiles
    assert memory.total >= 4 * SIZE + LOOPS * ROWS * WIDTH * 4
    assert memory.total == sum(
        (memory.arguments, memory.outputs, -memory.aliases, memory.temporaries, memory.code)
    )


def test_gradients_are_summed_once_over_all_devices(report):
    assert sum(each.size * each.times for each in report.program.all_reduces) == 2 * SIZE
    assert {each.devices for each in report.program.all_reduces} <= {0, V3.num_devices}
    assert {each.times for each in report.program.all_reduces} == {1.0}


def test_the_part_of_the_update_is_known_by_its_name(report):
    # Reads gradient, moment and weight, writes both; what the finiteness check reads is not its own.
    assert 4 * SIZE <= report.work.update_bytes <= 12 * SIZE
    assert 0 < report.update_seconds < report.compiler_seconds < report.bound.total
    assert report.bound.update >= report.update_seconds and report.bound.all_reduce > 0
    assert report.program.cycles("no_such_name") == 0
    assert report.bound.total >= FLOPS / (V3.chip.peak_flops / 2)


def test_lines_and_json_say_the_same(report):
    values, text = report.as_json(), "\n".join(report.lines())
    assert values["variables_in_place_bytes"] == values["variables_bytes"] == 4 * SIZE
    assert f"{4 * SIZE:,} of {4 * SIZE:,} bytes" in text
    assert values["flops"]["ratio"] == 1.0 and "100.00%" in text
    assert values["seconds"]["lower_bound"] == report.bound.total


def test_a_variable_that_is_copied_is_refused(report):
    copied = dataclasses.replace(report, state_sizes=(*report.state_sizes, 12))
    with pytest.raises(StepError, match=f"all {4 * SIZE + 12:,} bytes .* Received: {4 * SIZE:,}$"):
        copied.check()


def test_a_sum_in_each_micro_batch_is_refused():
    step, variables = make_step(V3, sum_in_loop=True)
    with pytest.raises(StepError, match=f"over all 8. Received: .* {LOOPS} times an update"):
        check(step, V3, variables)


@pytest.mark.parametrize(
    ("average", "received"),
    [
        (lambda nest: nest, "none"),
        (compiler.cross_replica_sum(parse_slice("v5litepod-1")), "over 1 devices|none"),
    ],
)
def test_gradients_that_stay_on_their_devices_are_refused(average, received):
    step, variables = make_step(V5E, average=average)
    with pytest.raises(
        compiler.CompileError, match=f"over all 4. Received: .*({received})|refuses"
    ):
        check(step, V5E, variables)


@pytest.mark.parametrize("strides", [1, 2])
def test_flops_of_convolutions_are_those_of_xla(strides):
    image, kernel = tf.TensorSpec([2, 17, 17, 8]), tf.TensorSpec([3, 3, 8, 16])

    def both_gradients(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = tf.reduce_sum(tf.nn.conv2d(x, w, strides, "SAME"))
        return tape.gradient(y, [x, w])

    where = parse_slice("v5litepod-1")
    compiled = compiler.compile_step(both_gradients, [image, kernel], where)
    # What XLA counts beside products is a sum, a few elements each.
    assert compiled.matmul_flops == pytest.approx(compiled.flops, rel=0.05)
    assert compiled.matmul_flops > 0


@pytest.mark.parametrize("stride, pad, spread, dilation", np.ndindex(3, 3, 3, 2))
def test_places_of_a_window_are_counted(stride, pad, spread, dilation):
    stride, spread, dilation = stride + 1, spread + 1, dilation + 1
    image, kernel, output = 7, 3, 5
    there = [i * spread for i in range(image)]
    expected = sum(
        o * stride + k * dilation - pad in there for o in range(output) for k in range(kernel)
    )
    found = hlo._valid_pairs(image, kernel, output, stride, pad, spread, dilation)
    assert found == expected


def test_an_operation_that_tpus_lack_is_named_with_its_line():
    def step(x):
        return tf.strings.length(tf.strings.as_string(x))

    with pytest.raises(compiler.CompileError) as raised:
        compiler.compile_step(step, [tf.TensorSpec([4])], V3)
    text = str(raised.value)
    assert "AsString" in text and "test_compiler.py, line" in text and "\n" not in text


def test_too_large_a_program_is_refused_with_its_bytes():
    def step(x):
        product = x @ tf.transpose(x)
        return product, product @ product

    with pytest.raises(compiler.OutOfMemoryError) as raised:
        compiler.compile_step(step, [tf.TensorSpec([60_000, 1000])], V3)
    assert raised.value.needed > 60_000**2 * 4 / 2
    assert 14 * 2**30 < raised.value.available <= 16 * 2**30
    assert "\n" not in str(raised.value) and "GiB" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "needed", "available"),
    [
        ("memory required for HLO temporaries (620.64G) exceeds available HBM (15.48G). HLO", 620.64, 15.48),
        ("Ran out of memory in memory space hbm. Used 17.10G of 15.48G hbm. Exceeded", 17.10, 15.48),
        ("Used 900.50M of 15.48G hbm.", 900.50 / 1024, 15.48),
    ],
)  # fmt: skip
def test_the_compilers_ways_to_say_that_memory_is_short(text, needed, available):
    error = compiler._compile_failure(f"RESOURCE_EXHAUSTED: {text}", V3)
    assert isinstance(error, compiler.OutOfMemoryError)
    assert math.isclose(error.needed, needed * 2**30, rel_tol=1e-6)
    assert math.isclose(error.available, available * 2**30, rel_tol=1e-6)


def test_where_the_compiler_is_missing_one_line_says_what_to_install(monkeypatch):
    compiler._private.cache_clear()
    compiler._devices.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "libtpu", None)
        with pytest.raises(compiler.CompileError) as raised:
            compiler.topology_devices(V3)
    assert "pip install -e '.[preflight]' -c constraints.txt" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert compiler.topology_devices(V3) == 8
