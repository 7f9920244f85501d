"""Parameters and moments stored in fewer bits than they are computed in.

In bfloat16 neighbouring numbers are 0.4 to 0.8% apart, in float16 0.05 to 0.1%. A step below half
of that is lost when the result is rounded to nearest, so training stands still at small learning
rates. Two remedies: remember what rounding cut off (compensated, Kahan's summation), or round up
or down at random so that the mean is right (stochastic).
"""

import tensorflow as tf

from lamb_tf.element_hash import mix, places

ROUNDINGS = ("compensated", "stochastic", "nearest")
# Bits that a float32 loses in its significand.
_CUT_BITS = {tf.bfloat16: 16, tf.float16: 13}


def compute_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype of all arithmetic: float64 for float64 variables, else float32.

    In bfloat16 beta_2 = 0.999 rounds to 1, and in float16 the squared norm of 65,000 elements
    of size 1 overflows.
    """
    return tf.float64 if dtype == tf.float64 else tf.float32


def is_low(dtype: tf.DType) -> bool:
    """Tells whether a dtype has fewer bits than its arithmetic."""
    return dtype in _CUT_BITS


def _cut(x: tf.Tensor, dtype: tf.DType, up: tf.Tensor) -> tf.Tensor:
    """Returns float32 `x` with `up` added below the bits that `dtype` keeps, then cut there."""
    bits = tf.bitcast(x, tf.int32)
    kept = tf.bitwise.bitwise_and(bits + up, -(2 ** _CUT_BITS[dtype]))
    # Infinities and NaNs would turn into one another.
    return tf.where(tf.math.is_finite(x), tf.bitcast(kept, tf.float32), x)


def round_to_nearest(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns float32 `x` rounded to the significand of `dtype`, ties to even, as float32.

    A cast there and back may be optimised away by XLA; this may not.
    """
    cut = _CUT_BITS[dtype]
    last = tf.bitwise.bitwise_and(tf.bitwise.right_shift(tf.bitcast(x, tf.int32), cut), 1)
    rounded = _cut(x, dtype, last + (2 ** (cut - 1) - 1))
    if dtype != tf.float16:
        return rounded
    # Below 2^-14 float16 numbers are multiples of 2^-24.
    return tf.where(tf.abs(x) < 2.0**-14, tf.round(x * 2.0**24) * 2.0**-24, rounded)


def round_stochastically(x: tf.Tensor, dtype: tf.DType, seed: tf.Tensor) -> tf.Tensor:
    """Returns float32 `x` rounded to a neighbour in `dtype`, right in the mean, as float32.

    Args:
      x: float32.
      dtype: bfloat16 or float16.
      seed: int32 [2]; equal seeds round alike, on all replicas.
    """
    dropped = tf.constant(32 - _CUT_BITS[dtype], tf.uint32)
    noise = tf.bitwise.right_shift(_random_words(x.shape, seed), dropped)
    return _cut(x, dtype, tf.cast(noise, tf.int32))


def _random_words(shape: tf.TensorShape, seed: tf.Tensor) -> tf.Tensor:
    """Returns a uint32 for each element, a hash of the seed and of its place."""
    odd = tf.constant([0x9E3779B9, 0x85EBCA6B], tf.uint32)
    key = tf.reduce_sum(tf.cast(seed, tf.uint32) * odd)
    return mix(tf.bitwise.bitwise_xor(mix(places(shape, key)), key))


def widen(param: tf.Tensor, residual: tf.Tensor | None) -> tf.Tensor:
    """Returns a stored parameter in its compute dtype.

    Args:
      param: of any float dtype.
      residual: what rounding had cut off, or `None`. It is ignored where `param` was changed
        since by somebody else, as by loading weights.
    """
    x = tf.cast(param, compute_dtype(param.dtype))
    if residual is None:
        return x
    residual = tf.cast(residual, x.dtype)
    # Slightly less of it, for a residual of just half a unit belongs to `param` as well.
    own = tf.equal(round_to_nearest(x + 0.99 * residual, param.dtype), x)
    return tf.where(own, x + residual, x)


def narrow(
    x: tf.Tensor, dtype: tf.DType, rounding: str, seed: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Returns `x` as `dtype`, and the bfloat16 residual if rounding is compensated.

    Args:
      x: in a compute dtype.
      dtype: as it is stored.
      rounding: one of `ROUNDINGS`; plain where `dtype` loses no bits.
      seed: int32 [2] for stochastic rounding, of the residual too.
    """
    if not is_low(dtype) or rounding == "nearest":
        return tf.cast(x, dtype), None
    x = tf.cast(x, tf.float32)  # moments of float64 variables come in float64
    if rounding == "stochastic":
        return tf.cast(round_stochastically(x, dtype, seed), dtype), None
    kept = round_to_nearest(x, dtype)
    # Rounded to nearest, the residual would swallow in its turn what is too small for it.
    residual = round_stochastically(x - kept, tf.bfloat16, seed)
    return tf.cast(kept, dtype), tf.cast(residual, tf.bfloat16)
