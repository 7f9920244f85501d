"""The forward pass against tf-models' own model, and the dropout against its definition."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from pretraining import bert_forward, model

BERT = model.BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
)
ROWS, LENGTH, PLACES, TOKENS = 3, 16, 4, 50


def a_batch():
    rng = np.random.default_rng(0)
    used = np.arange(LENGTH) < np.array([[16], [9], [2]])
    return {
        "input_word_ids": tf.constant(rng.integers(0, TOKENS, [ROWS, LENGTH]) * used, tf.int32),
        "input_mask": tf.constant(used, tf.int32),
        "input_type_ids": tf.constant(rng.integers(0, 2, [ROWS, LENGTH]) * used, tf.int32),
        "masked_lm_positions": tf.constant(rng.integers(0, LENGTH, [ROWS, PLACES]), tf.int32),
    }


def shaken(network):
    """Weights that show a mistake: norms and biases are not 1 and 0, as they start."""
    rng = np.random.default_rng(1)
    network.set_weights([w + 0.1 * rng.normal(size=w.shape) for w in network.get_weights()])
    return network


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
def test_logits_and_gradients_are_those_of_the_model(act, jit):
    network = shaken(model.build_pretrainer(dataclasses.replace(BERT, hidden_act=act), TOKENS))
    batch, variables = a_batch(), network.trainable_variables
    rng = np.random.default_rng(2)
    weights = [
        tf.constant(rng.normal(size=[ROWS * PLACES, TOKENS]), tf.float32),
        tf.constant(rng.normal(size=[ROWS, 2]), tf.float32),
    ]

    def gradients(logits_of):
        with tf.GradientTape() as tape:
            logits = logits_of()
            total = sum(tf.reduce_sum(a * b) for a, b in zip(logits, weights, strict=True))
        return logits, [tf.convert_to_tensor(g) for g in tape.gradient(total, variables)]

    def theirs():
        outputs = network(batch, training=False)
        return tf.reshape(outputs["mlm_logits"], [-1, TOKENS]), outputs["next_sentence"]

    function = tf.function(
        lambda: gradients(lambda: bert_forward.forward(network, batch, None)), jit_compile=jit
    )
    ours, expected = function(), gradients(theirs)
    for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(tf.reduce_max(tf.abs(b)) + 1e-3))


def test_bfloat16_computes_what_the_model_computes_up_to_its_precision():
    policy = tf_keras.mixed_precision.global_policy()
    try:
        tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
        network = shaken(model.build_pretrainer(BERT, TOKENS))
    finally:
        tf_keras.mixed_precision.set_global_policy(policy)
    batch = a_batch()
    outputs = network(batch, training=False)
    masked, sentence = bert_forward.forward(network, batch, None)
    assert masked.dtype == sentence.dtype == tf.float32
    np.testing.assert_allclose(
        masked, tf.reshape(tf.cast(outputs["mlm_logits"], tf.float32), [-1, TOKENS]), atol=0.05
    )
    np.testing.assert_allclose(sentence, tf.cast(outputs["next_sentence"], tf.float32), atol=0.05)


def test_dropout_is_a_function_of_seed_step_stream_and_place():
    network, batch = model.build_pretrainer(BERT, TOKENS), a_batch()

    def logits(seed, step, stream):
        key = bert_forward.dropout_key(
            seed, tf.constant(step, tf.int64), tf.constant(stream, tf.int64)
        )
        return bert_forward.forward(network, batch, key)[0].numpy()

    first = logits(1, 5, 0)
    np.testing.assert_array_equal(logits(1, 5, 0), first)
    for other in ((2, 5, 0), (1, 6, 0), (1, 5, 1), (5, 1, 0), (0, 5, 1)):
        assert (logits(*other) != first).any()
    without = bert_forward.forward(network, batch, None)[0].numpy()
    assert (without != first).any()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_without_a_pattern(rate):
    """Share, neighbours, layers and steps: as independent coins, within four standard deviations."""
    size, ones = 1 << 18, tf.ones([512, 512])

    def dropped(step, layers):
        drop = bert_forward.Dropout(
            bert_forward.dropout_key(3, tf.constant(step, tf.int64), tf.constant(0, tf.int64))
        )
        outputs = [drop(ones, rate).numpy() for _ in range(layers)]
        for output in outputs:
            kept = output[output != 0]
            np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)
        return [(output == 0).ravel() for output in outputs]

    first, second = dropped(7, 2)
    (later,) = dropped(8, 1)
    deviation = 4 * np.sqrt(rate * (1 - rate) / size)
    for mask in (first, second, later):
        assert abs(mask.mean() - rate) < deviation
    both = rate * rate
    deviation = 4 * np.sqrt(both * (1 - both) / size)
    for a, b in (
        (first, second),
        (first, later),
        (first[1:], first[:-1]),
        (first[512:], first[:-512]),
    ):
        assert abs((a & b).mean() - both) < deviation


def test_nothing_is_dropped_without_a_key_or_a_rate():
    x = tf.random.stateless_normal([8, 8], [1, 2])
    np.testing.assert_array_equal(bert_forward.Dropout(None)(x, 0.5), x)
    key = bert_forward.dropout_key(1, tf.constant(1, tf.int64), tf.constant(1, tf.int64))
    np.testing.assert_array_equal(bert_forward.Dropout(key)(x, 0.0), x)
