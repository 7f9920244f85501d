"""Random numbers without a generator: a hash of where an element stands in its tensor.

XLA computes such a number where it is used. A generator of TensorFlow's writes its numbers to memory
first, with copies: on a TPU 20 times the traffic of an optimizer's update.
"""

import math

import tensorflow as tf


def mix(words: tf.Tensor) -> tf.Tensor:
    """Returns a hash of each of the uint32 words; "lowbias32" of Wellons' hash prospector."""
    xor, shift = tf.bitwise.bitwise_xor, tf.bitwise.right_shift
    sixteen, fifteen = tf.constant(16, tf.uint32), tf.constant(15, tf.uint32)
    words = xor(words, shift(words, sixteen)) * tf.constant(0x7FEB352D, tf.uint32)
    words = xor(words, shift(words, fifteen)) * tf.constant(0x846CA68B, tf.uint32)
    return xor(words, shift(words, sixteen))


def places(shape: tf.TensorShape, key: tf.Tensor, factor: int = 1) -> tf.Tensor:
    """Returns for each element its row-major position times a factor plus a key, modulo 2^32.

    Args:
      shape: fully known.
      key: uint32 scalar. It comes first: XLA would turn the positions alone into a constant, which
        in a large program is gigabytes.
      factor: odd, to keep all positions apart.

    Returns:
      uint32 of the shape, a sum over axes: a reshape of flat positions would move data on a TPU.
    """
    words = key
    for axis in range(len(shape)):
        step = math.prod(shape[axis + 1 :]) * factor % 2**32
        along = tf.cast(tf.range(shape[axis]), tf.uint32) * tf.constant(step, tf.uint32)
        words = words + tf.reshape(along, [-1] + [1] * (len(shape) - 1 - axis))
    return words
