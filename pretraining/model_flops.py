"""What a BERT costs in arithmetic and memory, and what the device can do: utilisation is a quotient.

Model FLOPs are those that the model's definition asks for, on real tokens alone: what is spent on
padding, on recomputing or on dropout is no use to the model and lowers the utilisation.
"""

import time

import tensorflow as tf

from pretraining.model import BertConfig
from pretraining.train_step import on_first_replica

BYTES = {"float32": 4, "bfloat16": 2}
# Large enough for the full rate, small enough for milliseconds a multiplication.
CPU_MATRIX, ACCELERATOR_MATRIX = 1024, 4096
MEASURED_SECONDS, TRIALS = 0.05, 3


def flops(
    bert: BertConfig,
    vocab_size: int,
    *,
    tokens: float,
    token_pairs: float,
    predictions: float,
    rows: float,
) -> float:
    """Returns the FLOPs of one update, forward and backward, of its matrix products.

    A multiplication with an addition counts as two. For BERT-Large it is 240.6 GFLOP a sequence of
    128 tokens with 20 predictions, and 1019.8 for one of 512 with 76.

    Args:
      bert: the dimensions.
      vocab_size: width of the masked-LM logits.
      tokens: sum of n over the rows, n being the real tokens of a row.
      token_pairs: sum of n * n over the rows, what attention looks at.
      predictions: masked tokens.
      rows: of the batch, padding rows left out.
    """
    hidden, inner = bert.hidden_size, bert.intermediate_size
    # Query, key, value and output; then the two layers of the feed-forward part.
    per_token = bert.num_hidden_layers * (8 * hidden**2 + 4 * hidden * inner)
    per_pair = bert.num_hidden_layers * 4 * hidden  # scores, and the mean that they weight
    per_prediction = 2 * hidden**2 + 2 * hidden * vocab_size
    per_row = 2 * hidden**2 + 4 * hidden  # the pooler and two next-sentence logits
    forward = (
        per_token * tokens + per_pair * token_pairs + per_prediction * predictions + per_row * rows
    )
    return 3.0 * forward  # backward takes a product for each of the two factors


def matmul_rate(strategy: tf.distribute.Strategy, precision: str) -> float:
    """Measures the matrix products of all replicas together, in FLOP/s; takes half a second.

    All replicas of this process multiply at once, so that those which share a CPU share its rate.
    Other workers are taken to be as fast as this one.

    Args:
      strategy: of the run.
      precision: "float32" or "bfloat16", the dtype of both factors.
    """
    on_cpu = ":CPU:" in strategy.extended.worker_devices[0].upper()
    size = CPU_MATRIX if on_cpu else ACCELERATOR_MATRIX
    dtype = tf.dtypes.as_dtype(precision)

    def multiply(count: tf.Tensor) -> tf.Tensor:
        # Of this scale, so that products keep the size of their first factor.
        factor = tf.random.stateless_normal([size, size], [0, 1], stddev=size**-0.5)
        factor = product = tf.cast(factor, dtype)
        for _ in tf.range(count):
            product = tf.matmul(product, factor)
        return tf.cast(product[0, 0], tf.float32)

    def multiply_and_sum(count: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, multiply(count))

    @tf.function
    def multiply_everywhere(count: tf.Tensor) -> tf.Tensor:
        return on_first_replica(strategy, strategy.run(multiply_and_sum, args=(count,)))

    def seconds(count: int) -> float:
        started = time.perf_counter()
        # Waits for all replicas, but fetches one number: of a pod's thousands that would take longer.
        multiply_everywhere(tf.constant(count)).numpy()
        return time.perf_counter() - started

    def least_seconds(count: int) -> float:
        # Whatever else the machine does makes the others slower.
        return min(seconds(count) for _ in range(TRIALS))

    seconds(1)
    start = least_seconds(1)  # what a call to far away devices takes by itself
    count = 1
    while (best := least_seconds(count + 1) - start) < MEASURED_SECONDS:
        count *= 2
    return strategy.num_replicas_in_sync * count * 2.0 * size**3 / best


def parameter_count(bert: BertConfig, vocab_size: int) -> int:
    """Returns how many parameters are trained, both heads included.

    Args:
      bert: the dimensions.
      vocab_size: rows of the table of token embeddings, which the masked-LM head shares.
    """
    hidden, inner = bert.hidden_size, bert.intermediate_size
    norm, square = 2 * hidden, hidden * hidden + hidden
    embeddings = (vocab_size + bert.max_position_embeddings + bert.type_vocab_size) * hidden + norm
    feed_forward = hidden * inner + inner + inner * hidden + hidden
    layer = 4 * square + norm + feed_forward + norm
    masked_lm = square + norm + vocab_size
    next_sentence = square + 2 * hidden + 2
    return embeddings + bert.num_hidden_layers * layer + masked_lm + next_sentence


def activation_bytes(
    bert: BertConfig, length: int, predictions: int, vocab_size: int, precision: str
) -> int:
    """Returns the memory that one row of a micro-batch needs until its gradient is computed.

    Equation 1 of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
    Models" (arXiv 2205.05198), s h (34 + 5 a s / h) bytes a layer in 16 bits, with 18 h + 4 i for
    34 h where the inner layer is not four times as wide; and the masked-LM logits, their softmax
    and their gradient in float32.

    Args:
      bert: the dimensions.
      length: s, tokens of a row, padding included.
      predictions: places for predictions in a row.
      vocab_size: width of the masked-LM logits.
      precision: "float32" or "bfloat16", of the activations.
    """
    widths = 18 * bert.hidden_size + 4 * bert.intermediate_size
    layer = length * (widths + 5 * bert.num_attention_heads * length)
    layers = bert.num_hidden_layers * layer * BYTES[precision] // BYTES["bfloat16"]
    return layers + 3 * BYTES["float32"] * predictions * vocab_size
