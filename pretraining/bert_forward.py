"""BERT's forward pass for training, as pure functions of a model's weights, for XLA.

`model.build_pretrainer` makes the weights; this computes what calling that model computes, in a form
from which XLA makes a faster program: products of matrices only, where the model's einsums make it
transpose a copy of every activation; one product for query, key and value; sums over the rows of a
matrix, not over two axes. Dropout is a hash of (key, layer, position): no state, and next to nothing
in time, where TensorFlow's generator took 7% of a step.
"""

from typing import Any

import tensorflow as tf
import tf_keras

from lamb_tf.element_hash import mix, places

NORM_EPSILON = 1e-12  # of every layer norm in tf-models' BERT
MASKED = -1e9


def dropout_key(seed: int, step: tf.Tensor, stream: tf.Tensor) -> tf.Tensor:
    """Returns a uint32 scalar, a function of the run's seed, the step and the micro-batch."""
    key = mix(tf.constant(seed % 2**32, tf.uint32))
    for word in (step, stream):
        key = mix(tf.bitwise.bitwise_xor(key, tf.cast(word, tf.uint32)))
    return key


class Dropout:
    """Drops elements as a function of a key, of how many times it was called, and of the place."""

    def __init__(self, key: tf.Tensor | None):
        self._key = key
        self._layer = 0

    def __call__(self, x: tf.Tensor, rate: float) -> tf.Tensor:
        """Returns x with a share of `rate` set to 0 and the rest scaled up; x itself without a key."""
        self._layer += 1
        if self._key is None or not rate:
            return x
        key = mix(tf.bitwise.bitwise_xor(self._key, tf.constant(self._layer, tf.uint32)))
        # An odd factor keeps places apart; keys shift them, and `mix` leaves nothing of either.
        words = places(x.shape, key, 0x9E3779B9)
        keep = mix(words) >= tf.constant(round(rate * 2**32), tf.uint32)
        return tf.where(keep, x / (1.0 - rate), tf.zeros([], x.dtype))


def forward(model: tf_keras.Model, batch: dict[str, tf.Tensor], key: tf.Tensor | None) -> Any:
    """Returns the logits of both heads, float32.

    Args:
      model: from `model.build_pretrainer`.
      batch: see `train_step.forward_sums`; its shapes are known.
      key: of the dropout, `None` for none.

    Returns:
      Masked-LM logits [rows * predictions, vocab_size] and next-sentence logits [rows, 2].
    """
    encoder, drop = model.encoder_network, Dropout(key)
    rows, length = batch["input_word_ids"].shape
    x = _embed(encoder, batch, drop)
    mask = (1.0 - tf.cast(batch["input_mask"], tf.float32))[:, None, None, :] * MASKED
    for block in encoder.transformer_layers:
        x = _norm(x + _attend(block, x, mask, drop), block._attention_layer_norm)
        h = _activation(block)(_dense(x, block._intermediate_dense))
        h = drop(_dense(h, block._output_dense), block._output_dropout.rate)
        x = _norm(x + h, block._output_layer_norm)
    places = batch["masked_lm_positions"] + tf.range(rows)[:, None] * length
    head = model.masked_lm
    h = head.dense.activation(_dense(tf.gather(x, tf.reshape(places, [-1])), head.dense))
    h = _norm(h, head.layer_norm)
    table = tf.cast(encoder.get_embedding_table(), h.dtype)
    mlm = tf.matmul(h, table, transpose_b=True) + tf.cast(head.bias, h.dtype)
    (sentence,) = model.classification_heads
    first = tf.reshape(x, [rows, length, -1])[:, 0]
    pooled = drop(tf.tanh(_dense(first, sentence.dense)), sentence.dropout_rate)
    return tf.cast(mlm, tf.float32), tf.cast(_dense(pooled, sentence.out_proj), tf.float32)


def _activation(block):
    return tf_keras.activations.get(block._inner_activation)


def _embed(encoder, batch, drop: Dropout) -> tf.Tensor:
    """Returns [rows * length, hidden]."""
    rows, length = batch["input_word_ids"].shape
    words, types = (
        tf.convert_to_tensor(layer.embeddings)
        for layer in (encoder.get_embedding_layer(), encoder._type_embedding_layer)
    )
    positions = tf.convert_to_tensor(encoder._position_embedding_layer._position_embeddings)
    kinds = tf.one_hot(tf.reshape(batch["input_type_ids"], [-1]), types.shape[0])
    x = tf.gather(words, tf.reshape(batch["input_word_ids"], [-1])) + tf.matmul(kinds, types)
    flat = tf.reshape(positions[:length], [1, -1])  # a sum over rows backward, not over two axes
    x = tf.reshape(tf.reshape(x, [rows, -1]) + flat, x.shape)
    x = _norm(x, encoder._embedding_norm_layer)
    x = tf.cast(x, encoder.compute_dtype)
    return drop(x, encoder._embedding_dropout.rate)


def _attend(block, x: tf.Tensor, mask: tf.Tensor, drop: Dropout) -> tf.Tensor:
    """Returns the attention's output, [rows * length, hidden], dropout included."""
    attention = block._attention_layer
    parts = (attention._query_dense, attention._key_dense, attention._value_dense)
    hidden, heads, size = parts[0].kernel.shape
    rows, length = mask.shape[0], mask.shape[-1]
    kernels = [tf.reshape(part.kernel, [hidden, -1]) for part in parts]
    biases = [tf.reshape(part.bias, [-1]) for part in parts]
    x = _affine(x, tf.concat(kernels, 1), tf.concat(biases, 0))
    x = tf.transpose(tf.reshape(x, [rows, length, 3, heads, size]), [2, 0, 3, 1, 4])
    scores = tf.matmul(x[0] * size**-0.5, x[1], transpose_b=True)
    weights = tf.nn.softmax(scores + tf.cast(mask, scores.dtype))
    x = tf.matmul(drop(weights, attention._dropout), x[2])
    x = tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [rows * length, -1])
    output = attention._output_dense
    x = _affine(x, tf.reshape(output.kernel, [-1, hidden]), output.bias)
    return drop(x, block._attention_dropout.rate)


def _dense(x: tf.Tensor, layer) -> tf.Tensor:
    return _affine(x, layer.kernel, layer.bias)


def _affine(x: tf.Tensor, kernel: Any, bias: Any) -> tf.Tensor:
    return tf.matmul(x, tf.cast(kernel, x.dtype)) + tf.cast(bias, x.dtype)


def _norm(x: tf.Tensor, layer) -> tf.Tensor:
    """Layer norm in float32."""
    dtype, x = x.dtype, tf.cast(x, tf.float32)
    mean, variance = tf.nn.moments(x, -1, keepdims=True)
    x = (x - mean) * tf.math.rsqrt(variance + NORM_EPSILON) * layer.gamma + layer.beta
    return tf.cast(x, dtype)
