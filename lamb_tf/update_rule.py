"""Algorithm 2 (LAMB) of You et al. as pure functions of tensors.

"Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
arXiv 1904.00962. For a layer with parameters x, gradient g, moments m and v at step t:

    m <- beta_1 m + (1 - beta_1) g                  v <- beta_2 v + (1 - beta_2) g^2
    m^ = m / (1 - beta_1^t)                         v^ = v / (1 - beta_2^t)
    r  = m^ / (sqrt(v^) + epsilon)
    u  = r + lambda x
    x <- x - eta * phi(|x|) / |u| * u               phi(z) = min(max(z, gamma_l), gamma_u)

No state and no framework; the optimizers of both Kerases have no other arithmetic. Algorithm 1
(LARS) follows from the same parts at the end.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from lamb_tf.settings import LambSettings, LarsSettings, LayerwiseSettings


class LambState(NamedTuple):
    """What a step of LAMB reads and writes for one layer, in the compute dtype.

    Attributes:
      param: x, the layer's parameters.
      first_moment: m, as `param` in shape.
      second_moment: v, as `param` in shape.
    """

    param: tf.Tensor
    first_moment: tf.Tensor
    second_moment: tf.Tensor


class LayerStatistics(NamedTuple):
    """What the trust ratio of one layer was made of in a step; scalars.

    Attributes:
      param_norm: |x| before the step.
      update_norm: |u|, decay included.
      trust_ratio: the factor of the learning rate; 1 where the layer is not adapted.
    """

    param_norm: tf.Tensor
    update_norm: tf.Tensor
    trust_ratio: tf.Tensor


def bias_correction(beta: float, step: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns 1 / (1 - beta^t), a scalar.

    Args:
      beta: decay rate of a moment, in [0, 1).
      step: t, a scalar that counts from 1.
      dtype: dtype of the result.
    """
    if beta == 0.0:
        return tf.ones([], dtype)
    # 1 - beta^t loses half of float32's digits where beta^t is near 1; expm1 keeps them.
    return tf.constant(-1.0, dtype) / tf.math.expm1(tf.cast(step, dtype) * math.log(beta))


def estimate(
    moment: tf.Tensor,
    newest: tf.Tensor,
    beta: float,
    step: tf.Tensor,
    *,
    corrected: bool,
    nesterov: bool,
) -> tf.Tensor:
    """Returns m^ or v^, the estimate that a moment stands for.

    With Nesterov momentum it looks a step ahead, as in Dozat's NAdam with a constant beta:
    beta m / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t).

    Args:
      moment: m or v after this step.
      newest: g or g^2 of this step.
      beta: decay rate of the moment.
      step: t, a scalar that counts from 1.
      corrected: whether to divide by 1 - beta^t.
      nesterov: whether to look a step ahead.
    """
    dtype = moment.dtype
    one = tf.ones([], dtype)
    now = bias_correction(beta, step, dtype) if corrected else one
    if not nesterov:
        return moment * now
    ahead = bias_correction(beta, step + 1, dtype) if corrected else one
    return moment * (beta * ahead) + newest * ((1.0 - beta) * now)


def sum_of_squares(x: tf.Tensor) -> tf.Tensor:
    """Returns the sum over the squares of all elements, a scalar."""
    return tf.reduce_sum(tf.square(x))


def norm(x: tf.Tensor, kind: str, squares: Callable = sum_of_squares) -> tf.Tensor:
    """Returns the "l2", "l1" or "linf" norm over all elements, a scalar."""
    if kind == "l2":
        return tf.sqrt(squares(x))
    if kind == "l1":
        return tf.reduce_sum(tf.abs(x))
    return tf.maximum(tf.reduce_max(tf.abs(x)), 0.0)  # of no elements it is -infinity


def phi(param_norm: tf.Tensor, lower: float, upper: float | None) -> tf.Tensor:
    """Returns min(max(z, gamma_l), gamma_u); the paper's experiments use the identity."""
    bounded = tf.maximum(param_norm, lower) if lower > 0 else param_norm
    return bounded if upper is None else tf.minimum(bounded, upper)


def trust_ratio(param_norm: tf.Tensor, update_norm: tf.Tensor, cap: float | None) -> tf.Tensor:
    """Returns phi(|x|) / |u|, and 1 where either is zero, as all implementations do.

    Args:
      param_norm: phi(|x|).
      update_norm: |u|.
      cap: the largest ratio, `None` for no such limit.
    """
    usable = tf.minimum(param_norm, update_norm) > 0
    ratio = tf.where(usable, param_norm / update_norm, 1.0)
    return ratio if cap is None else tf.minimum(ratio, cap)


def measure(
    param_norm: tf.Tensor, update_norm: tf.Tensor, settings: LayerwiseSettings, *, adapted: bool
) -> LayerStatistics:
    """Returns both norms and the trust ratio phi(|x|) / |u|, 1 for a layer that is not adapted."""
    s, ratio = settings, tf.ones([], param_norm.dtype)
    if adapted:
        bounded = phi(param_norm, s.min_param_norm, s.max_param_norm)
        ratio = trust_ratio(bounded, update_norm, s.max_trust_ratio)
    return LayerStatistics(param_norm, update_norm, ratio)


def layer_step(
    x: tf.Tensor,
    u: tf.Tensor,
    learning_rate: tf.Tensor,
    settings: LayerwiseSettings,
    *,
    adapted: bool,
    squares: Callable = sum_of_squares,
) -> tuple[tf.Tensor, LayerStatistics]:
    """Returns x - eta * phi(|x|) / |u| * u, and the norms that it took."""
    kind = settings.norm
    statistics = measure(norm(x, kind, squares), norm(u, kind, squares), settings, adapted=adapted)
    return x - learning_rate * statistics.trust_ratio * u, statistics


def unchanged(moment: tf.Tensor, number: int) -> tf.Tensor:
    """Returns a moment that is stored as it was computed."""
    del number
    return moment


def lamb_update(
    state: LambState,
    gradient: tf.Tensor,
    step: tf.Tensor,
    learning_rate: tf.Tensor,
    settings: LambSettings,
    *,
    decayed: bool,
    adapted: bool,
    squares: Callable = sum_of_squares,
    keep: Callable = unchanged,
) -> tuple[LambState, LayerStatistics]:
    """One step of Algorithm 2 for one layer; everything in one dtype, float32 or float64.

    Args:
      state: x, m and v.
      gradient: g, dense, as x in shape.
      step: t, a scalar that counts from 1.
      learning_rate: eta_t, a scalar.
      settings: beta_1, beta_2, epsilon, lambda, and which member of the family it is.
      decayed: whether weight decay applies to this layer.
      adapted: whether the step is scaled by the trust ratio.
      squares: sums the squares of a tensor.
      keep: takes a new moment and its number, 0 or 1, and returns it as it will be stored.

    Returns:
      The new x, m and v, and the norms.
    """
    s, (x, m, v), g = settings, state, gradient
    first_ahead, second_ahead = s.nesterov is not None, s.nesterov == "both"

    m = keep(s.beta_1 * m + (1.0 - s.beta_1) * g, 0)
    v = keep(s.beta_2 * v + (1.0 - s.beta_2) * tf.square(g), 1)
    m_hat = estimate(m, g, s.beta_1, step, corrected=s.bias_correction, nesterov=first_ahead)
    v_hat = estimate(
        v, tf.square(g), s.beta_2, step, corrected=s.bias_correction, nesterov=second_ahead
    )
    divide = tf.divide if s.epsilon else tf.math.divide_no_nan  # 0 / 0 counts as 0
    u = divide(m_hat, tf.sqrt(v_hat) + s.epsilon)
    if decayed and s.weight_decay:
        u = u + s.weight_decay * x
    x, statistics = layer_step(x, u, learning_rate, s, adapted=adapted, squares=squares)
    return LambState(x, m, v), statistics


class LarsState(NamedTuple):
    """What a step of LARS reads and writes for one layer, in the compute dtype.

    Attributes:
      param: x, the layer's parameters.
      momentum: m, as `param` in shape.
    """

    param: tf.Tensor
    momentum: tf.Tensor


def lars_update(
    state: LarsState,
    gradient: tf.Tensor,
    step: tf.Tensor,
    learning_rate: tf.Tensor,
    settings: LarsSettings,
    *,
    decayed: bool,
    adapted: bool,
    squares: Callable = sum_of_squares,
    keep: Callable = unchanged,
) -> tuple[LarsState, LayerStatistics]:
    """One step of Algorithm 1 (LARS), or of the form that scales the gradient.

    Algorithm 1 scales the momentum:  m <- beta m + (1 - beta) (g + lambda x)
                                      x <- x - eta * c phi(|x|) / |m| * m
    You, Gitman and Ginsburg 2017 (arXiv 1708.03888) scale the gradient before it enters:
                                      m <- beta m + eta * c |x| / (|g| + lambda |x|) * (g + lambda x)
                                      x <- x - m

    Args: as `lamb_update`; c is the trust coefficient, 1 in Algorithm 1. `step` is not used.

    Returns:
      The new x and m, and the norms; the update's norm is |m|, or |g| + lambda |x|.
    """
    s, (x, m), g = settings, state, gradient
    decay = s.weight_decay if decayed else 0.0
    d = g + decay * x if decay else g
    eta = learning_rate * s.trust_coefficient if adapted else learning_rate
    if s.scaled == "momentum":
        m = keep(s.momentum * m + (1.0 - s.momentum) * d, 0)
        u = s.momentum * m + (1.0 - s.momentum) * d if s.nesterov else m
        x, statistics = layer_step(x, u, eta, s, adapted=adapted, squares=squares)
        return LarsState(x, m), statistics
    param_norm = norm(x, s.norm, squares)
    update_norm = norm(g, s.norm, squares) + decay * param_norm
    statistics = measure(param_norm, update_norm, s, adapted=adapted)
    d = eta * statistics.trust_ratio * d
    m = keep(s.momentum * m + d, 0)
    u = s.momentum * m + d if s.nesterov else m
    return LarsState(x - u, m), statistics
