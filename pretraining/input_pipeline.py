"""Batches as a function of (seed, position): the step is all that a restart needs to know.

Position p is the p-th row of the run; step s takes rows s * B to (s + 1) * B of the global batch
size B, whatever the number of replicas or hosts. `lanes` says which record a row is.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from pretraining.batch_plan import BatchPlan
from pretraining.lanes import Lanes
from pretraining.masking import MaskSettings, mask_tokens, row_keys, token_table
from pretraining.record_format import RecordFormat, features
from pretraining.records import DynamicMasking, RecordSet
from pretraining.vocabulary import Vocabulary

# What reading a damaged, changed or vanished file raises, and the checks of `_finish`.
FAILURES = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)
Features = dict[str, tf.Tensor]
# Masks rows that come without masks: features and the [rows] int64 positions of their rows.
Masking = Callable[[Features, tf.Tensor], Features]


def dynamic_masking(
    settings: DynamicMasking, words: Vocabulary, max_predictions_per_seq: int, seed: int
) -> Masking:
    """Returns a function that draws the masks of rows from (seed, position).

    Args:
      settings: which part of the tokens, and which together.
      words: the vocabulary of the rows.
      max_predictions_per_seq: places for predictions in a row.
      seed: source of every choice.
    """
    table = token_table(words)
    masks = MaskSettings(
        **dataclasses.asdict(settings), max_predictions_per_seq=max_predictions_per_seq
    )

    def mask(batch: Features, positions: tf.Tensor) -> Features:
        keys = row_keys(seed, positions)
        ids, used = batch["input_word_ids"], batch["input_mask"]
        return {**batch, **mask_tokens(ids, used, keys, table, masks)}

    return mask


def train_dataset(
    records: RecordSet,
    record_format: RecordFormat,
    plan: BatchPlan,
    seed: int,
    start_step: int,
    context: tf.distribute.InputContext | None = None,
    masking: Masking | None = None,
) -> tf.data.Dataset:
    """Endless batches of one replica, beginning with those of step `start_step`.

    A host opens the lanes of its own rows only, where the global batch size is a multiple of the
    number of lanes or divides it; else all of them.

    Args:
      records: the training records.
      record_format: their lengths.
      plan: how a global batch is spread.
      seed: the run's seed.
      start_step: updates made so far.
      context: tells which host's rows to yield; all of them by default.
      masking: for records without masks.

    Returns:
      Batches as `train_step.forward_sums` takes them, of `plan.rows_per_replica` rows; a host's
      replicas take turns.
    """
    hosts, host = (context.num_input_pipelines, context.input_pipeline_id) if context else (1, 0)
    batch, rows = plan.global_batch_size, plan.global_batch_size // hosts
    lanes = Lanes(records, seed)
    chunk = batch // len(lanes) if batch % len(lanes) == 0 else 1
    cycle = len(lanes) * chunk  # rows after which it is the first lane's turn again
    cycles, rest = divmod(start_step * batch, cycle)
    of_host = _lanes_of_host(len(lanes), batch, hosts, host)
    if of_host is not None:
        stream = lanes.rows(of_host, chunk, cycles * chunk).skip(rest // hosts // chunk)
    else:
        stream = lanes.rows(np.arange(len(lanes)), chunk, cycles * chunk).skip(rest)
        stream = stream.rebatch(batch, drop_remainder=True)
        stream = stream.map(lambda step: step[host * rows : (host + 1) * rows])
    stream = stream.rebatch(plan.rows_per_replica, drop_remainder=True)
    turns = rows // plan.rows_per_replica

    def place(turn: tf.Tensor, serialized: tf.Tensor):
        first = (start_step + turn // turns) * batch + host * rows
        first += turn % turns * plan.rows_per_replica
        positions = first + tf.range(plan.rows_per_replica, dtype=tf.int64)
        return serialized, tf.ones([plan.rows_per_replica]), positions

    return _finish(stream.enumerate().map(place), records, record_format, masking)


def _lanes_of_host(lanes: int, batch: int, hosts: int, host: int) -> np.ndarray | None:
    """Returns the lanes of a host's rows in the order of the rows; None where all hosts share them."""
    rows = batch // hosts
    if batch % lanes == 0 and (lanes % hosts == 0):
        return np.arange(lanes)[host * lanes // hosts : (host + 1) * lanes // hosts]
    if lanes % batch == 0:
        # A cycle is some steps, each of which takes other lanes.
        return np.arange(lanes).reshape(-1, batch)[:, host * rows : (host + 1) * rows].ravel()
    return None


def eval_dataset(
    records: RecordSet,
    record_format: RecordFormat,
    plan: BatchPlan,
    context: tf.distribute.InputContext | None = None,
    masking: Masking | None = None,
) -> tf.data.Dataset:
    """Every record once, in the order of the files; rows of weight 0 fill the last batch.

    Arguments as for `train_dataset`. Records without masks get the same ones in each evaluation.
    """
    rows = Lanes(records, 0).in_order()
    padding = -records.num_records % plan.global_batch_size
    weighted = rows.map(lambda row: (row, 1.0))
    filler = rows.take(1).repeat(padding).map(lambda row: (row, 0.0))
    batches = weighted.concatenate(filler).batch(plan.rows_per_replica, drop_remainder=True)
    batches = batches.enumerate()
    if context is not None and context.num_input_pipelines > 1:
        batches = batches.shard(context.num_input_pipelines, context.input_pipeline_id)

    def place(number: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]):
        first = number * plan.rows_per_replica
        return *batch, first + tf.range(plan.rows_per_replica, dtype=tf.int64)

    return _finish(batches.map(place), records, record_format, masking)


def shards_in_use(records: RecordSet, plan: BatchPlan, seed: int, step: int) -> list[str]:
    """Returns the files that are read at a step: of each lane the current one and the next."""
    lanes = Lanes(records, seed)
    record = step * plan.global_batch_size // len(lanes)
    orders = [lanes.shards_at(lane, record) for lane in range(len(lanes))]
    return list(
        dict.fromkeys(path for turn in range(2) for o in orders for path in o[turn : turn + 1])
    )


def _finish(
    rows: tf.data.Dataset, records: RecordSet, record_format: RecordFormat, masking: Masking | None
) -> tf.data.Dataset:
    """Parses, checks and masks batches of (serialised records, row weights, positions)."""

    def parse(serialized: tf.Tensor, row_weights: tf.Tensor, positions: tf.Tensor) -> Features:
        parsed = tf.io.parse_example(serialized, features(records.keys, record_format))
        batch = {}
        for name, key in records.keys.items():
            value = parsed[key]
            batch[name] = tf.cast(value, tf.int32) if value.dtype == tf.int64 else value
        with tf.control_dependencies(_checks(batch, record_format)):
            batch = {name: tf.identity(value) for name, value in batch.items()}
        batch["next_sentence_labels"] = batch["next_sentence_labels"][:, 0]
        if masking is not None:
            batch = masking(batch, positions)
        return {**batch, "row_weights": row_weights}

    dataset = rows.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.ram_budget = 1 << 30
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


def _checks(batch: Features, record_format: RecordFormat) -> list[tf.Operation]:
    """Refuses ids beyond their range: an accelerator's gather would take another row instead."""
    return [
        tf.debugging.Assert(
            tf.reduce_all(tf.logical_and(value >= 0, value < record_format.limit(name))),
            [f"{name} out of range"],
        )
        for name, value in batch.items()
        if value.dtype == tf.int32
    ]
