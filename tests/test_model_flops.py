"""The formulas against the model as TensorFlow builds and XLA sees it, and against publications."""

import dataclasses
import math
import re

import numpy as np
import pytest
import tensorflow as tf

from pretraining import model, model_flops
from pretraining.train_step import forward_sums

VOCABULARY = 30522
ODD = model.BertConfig(  # no two dimensions alike, nor in the usual ratios
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=160,
    max_position_embeddings=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture(scope="module")
def network():
    return model.build_pretrainer(ODD, 500)


def dot_flops(hlo: str) -> int:
    """Adds up the matrix products of an HLO module from the shapes that it states."""
    shapes = {
        name: [int(d) for d in dims.split(",") if d]
        for name, dims in re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", hlo)
    }
    total = 0
    for name, left, contracted in re.findall(
        r"%?([\w.-]+) = \S+ dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.-]+),.*lhs_contracting_dims=\{([\d,]*)\}",
        hlo,
    ):
        inner = math.prod(shapes[left][int(d)] for d in contracted.split(",") if d)
        total += 2 * math.prod(shapes[name]) * inner
    return total


def test_the_flops_are_the_products_in_the_compilers_program(network):
    rows, length, predictions = 3, 40, 7
    variables = network.trainable_variables

    @tf.function(jit_compile=True)
    def gradients(batch):
        with tf.GradientTape() as tape:
            sums = forward_sums(network, batch)
            loss = sums["mlm_loss"] + sums["nsp_loss"]
        return tape.gradient(loss, variables)

    row = tf.ones([rows, length], tf.int32)
    places = tf.ones([rows, predictions], tf.int32)
    batch = {
        "input_word_ids": row,
        "input_mask": row,
        "input_type_ids": row,
        "masked_lm_positions": places,
        "masked_lm_ids": places,
        "masked_lm_weights": tf.ones([rows, predictions]),
        "next_sentence_labels": tf.ones([rows], tf.int32),
        "row_weights": tf.ones([rows]),
    }
    counted = dot_flops(gradients.experimental_get_compiler_ir(batch)(stage="hlo"))
    expected = model_flops.flops(
        ODD,
        500,
        tokens=rows * length,
        token_pairs=rows * length**2,
        predictions=rows * predictions,
        rows=rows,
    )
    # tf-models looks up the two token types by a product, which no definition of BERT asks for.
    assert expected == pytest.approx(counted, rel=0.005)
    assert expected <= counted


@pytest.mark.parametrize(("length", "predictions", "gflop"), [(128, 20, 240.6), (512, 76, 1019.8)])
def test_a_sequence_of_bert_large(length, predictions, gflop):
    counts = {"tokens": length, "token_pairs": length**2, "predictions": predictions, "rows": 1}
    large = model.MODELS["large"]
    assert round(model_flops.flops(large, VOCABULARY, **counts) / 1e9, 1) == gflop


def test_padding_costs_nothing_and_two_batches_cost_their_sum():
    def flops(lengths):
        return model_flops.flops(
            ODD,
            500,
            tokens=sum(lengths),
            token_pairs=sum(n * n for n in lengths),
            predictions=2 * len(lengths),
            rows=len(lengths),
        )

    assert flops([40]) + flops([9, 17]) == pytest.approx(flops([40, 9, 17]))
    assert flops([40, 40]) > 2 * flops([20, 20]), "attention grows with the square of the length"


def test_the_parameters_are_those_of_the_model(network):
    built = sum(int(np.prod(v.shape)) for v in network.trainable_variables)
    assert model_flops.parameter_count(ODD, 500) == built


@pytest.mark.parametrize(("name", "millions"), [("base", 110), ("large", 335)])
def test_the_parameters_are_those_of_the_publication(name, millions):
    """110M and 340M in Devlin et al. (2018), table 1; the second one exactly 335.1M encoder."""
    bert = model.MODELS[name]
    heads = VOCABULARY + 2 * bert.hidden_size**2
    count = model_flops.parameter_count(bert, VOCABULARY) - heads
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "attention_part"),
    [(12288, 96, 96, 80), (20480, 105, 128, 64)],
    ids=["GPT-3", "MT-NLG"],
)
def test_the_activations_are_those_of_the_paper(hidden, layers, heads, attention_part):
    """Korthikanti et al.: 5as/h is 80 for GPT-3 and 64 for MT-NLG, at s = 2048."""
    bert = dataclasses.replace(
        ODD,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    half = model_flops.activation_bytes(bert, 2048, 0, VOCABULARY, "bfloat16")
    assert half == layers * 2048 * hidden * (34 + attention_part)
    full = model_flops.activation_bytes(bert, 2048, 10, VOCABULARY, "float32")
    assert full == 2 * half + 3 * 4 * 10 * VOCABULARY


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_rate_of_all_replicas_is_measured(replicas, monkeypatch):
    """By a clock on which a call takes 9 s, and each product 2 more."""
    monkeypatch.setattr(model_flops, "CPU_MATRIX", 8)
    # A call to warm up, trials of one product, trials of two.
    durations = [11] * (1 + model_flops.TRIALS) + [13] * model_flops.TRIALS
    now = iter(np.cumsum([step for each in durations for step in (0, each)]))
    monkeypatch.setattr(model_flops.time, "perf_counter", lambda: next(now))
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    if replicas > 1:
        strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(replicas)],
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        )
    assert model_flops.matmul_rate(strategy, "bfloat16") == replicas * 2 * 8**3 / 2
