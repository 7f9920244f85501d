"""How many BERT examples a second come out of the input pipeline, beside tf-models' loader.

    python benchmarks/input_pipeline.py --rounds=7

Both read the same TFRecord files with static masks (made here, of random tokens, every example
full) and yield int32 batches. The dynamic contenders read records without masks and draw them.
Each round opens every contender anew, in another order, lets some batches pass and times the next
ones: by the clock, and by the CPU time of the whole process, threads included, which is what a
core delivers. Writes a CSV and prints a table.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # measures this checkout

import numpy as np
import tensorflow as tf
from official.nlp.data import pretrain_dataloader

from benchmarks import report
from benchmarks.report import progress
from pretraining import data, records, vocabulary
from pretraining.batch_plan import BatchPlan
from pretraining.record_checks import RecordCheck
from pretraining.record_format import RecordFormat

PEER = "tf-models BertPretrainDataLoader"
PACKAGES = ("tensorflow", "tf-models-official")
COLUMNS = (
    "contender examples_per_sec examples_per_cpu_sec min_examples_per_cpu_sec first_batch_s rounds "
    "max_seq_length max_predictions_per_seq global_batch_size shards "
    "tensorflow tf-models-official lamb_tf machine command date"
).split()
WARM_UP = 8
WORDS, PIECES = 24000, 6517


def made_up_vocabulary() -> vocabulary.Vocabulary:
    """Returns as many tokens as BERT's vocabulary has, a fifth of them pieces of words."""
    words = [f"w{i}" for i in range(WORDS)]
    pieces = [f"##p{i}" for i in range(PIECES)]
    return vocabulary.Vocabulary((*vocabulary.SPECIAL_TOKENS, *words, *pieces))


def write_records(folder: pathlib.Path, arguments: argparse.Namespace, words: int) -> list[str]:
    """Writes records of random tokens under the keys of the original BERT code."""
    rng = np.random.default_rng(0)
    length, predictions = arguments.max_seq_length, arguments.max_predictions_per_seq
    paths = []
    for shard in range(arguments.shards):
        paths.append(str(folder / f"records-{shard:05d}.tfrecord"))
        with tf.io.TFRecordWriter(paths[-1]) as writer:
            for _ in range(arguments.examples // arguments.shards):
                example = tf.train.Example()
                feature = example.features.feature
                ids = rng.integers(5, words, length)
                ids[[0, length // 2, -1]] = 2, 3, 3
                second = np.arange(length) > length // 2
                positions = np.sort(rng.choice(length - 2, predictions, replace=False)) + 1
                for key, values in {
                    "input_ids": ids,
                    "input_mask": np.ones(length, int),
                    "segment_ids": second.astype(int),
                    "masked_lm_positions": positions,
                    "masked_lm_ids": ids[positions],
                    "next_sentence_labels": rng.integers(0, 2, 1),
                }.items():
                    feature[key].int64_list.value.extend(values.tolist())
                feature["masked_lm_weights"].float_list.value.extend([1.0] * predictions)
                writer.write(example.SerializeToString())
    return paths


def contenders(
    paths: list[str], arguments: argparse.Namespace, words: vocabulary.Vocabulary
) -> dict[str, Callable[[], tf.data.Dataset]]:
    """Returns what makes each contender's data set."""
    record_format = RecordFormat(
        max_seq_length=arguments.max_seq_length,
        max_predictions_per_seq=arguments.max_predictions_per_seq,
        vocab_size=len(words),
        type_vocab_size=2,
    )
    static = RecordCheck(record_format=record_format, flag="records").run(paths)
    unmasked = {name: key for name, key in static.keys.items() if "masked" not in name}
    plan = BatchPlan(global_batch_size=arguments.batch, num_replicas=1)

    def ours(masking: records.DynamicMasking | None) -> tf.data.Dataset:
        train = static
        if masking is not None:
            train = dataclasses.replace(static, keys=unmasked, masking=masking)
        held = data.Data(words=words, record_format=record_format, train=train, held_out=None)
        return held.train_input(plan, 1, 0)(tf.distribute.InputContext())

    def theirs() -> tf.data.Dataset:
        config = pretrain_dataloader.BertPretrainDataConfig(
            input_path=",".join(paths),
            seq_length=arguments.max_seq_length,
            max_predictions_per_seq=arguments.max_predictions_per_seq,
            global_batch_size=arguments.batch,
            is_training=True,
            use_next_sentence_label=True,
        )
        return pretrain_dataloader.BertPretrainDataLoader(config).load()

    return {
        "lamb_tf static masks": lambda: ours(None),
        "lamb_tf dynamic masks": lambda: ours(records.DynamicMasking(0.15, False)),
        "lamb_tf dynamic whole-word masks": lambda: ours(records.DynamicMasking(0.15, True)),
        PEER: theirs,
    }


def measure(make: Callable[[], tf.data.Dataset], batches: int, batch: int) -> dict[str, float]:
    """Opens a data set and times some batches of it."""
    start = time.perf_counter()
    iterator: Iterator = iter(make())
    next(iterator)
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        next(iterator)
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(iterator)
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    return {
        "first_batch_s": first,
        "examples_per_sec": batches * batch / seconds,
        "examples_per_cpu_sec": batches * batch / cpu_seconds,
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40, help="timed in a round")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--examples", type=int, default=65536)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--max_predictions_per_seq", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/...")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    arguments = parse_arguments()
    words = made_up_vocabulary()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress(f"writing {arguments.examples} records")
        makers = contenders(write_records(folder, arguments, len(words)), arguments, words)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
        order = random.Random(0)
        for number in range(arguments.rounds):
            for name in order.sample(list(makers), len(makers)):
                results[name].append(measure(makers[name], arguments.batches, arguments.batch))
            progress(f"round {number + 1} of {arguments.rounds}")
    facts = report.facts(PACKAGES)
    rows = []
    for name, rounds in results.items():
        medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        rows.append(
            {
                "contender": name,
                "examples_per_sec": round(medians["examples_per_sec"]),
                "examples_per_cpu_sec": round(medians["examples_per_cpu_sec"]),
                "min_examples_per_cpu_sec": round(min(r["examples_per_cpu_sec"] for r in rounds)),
                "first_batch_s": round(medians["first_batch_s"], 3),
                "rounds": arguments.rounds,
                "max_seq_length": arguments.max_seq_length,
                "max_predictions_per_seq": arguments.max_predictions_per_seq,
                "global_batch_size": arguments.batch,
                "shards": arguments.shards,
                **facts,
            }
        )
    print(f"{'':34}{'examples/s':>12}{'a CPU s':>10}{'of peer':>9}{'first batch s':>15}")
    peer = next(row for row in rows if row["contender"] == PEER)
    for row in rows:
        ratio = row["examples_per_cpu_sec"] / peer["examples_per_cpu_sec"]
        print(
            f"{row['contender']:34}{row['examples_per_sec']:>12,}{row['examples_per_cpu_sec']:>10,}"
            f"{ratio:>9.2f}{row['first_batch_s']:>15.2f}"
        )
    report.write_csv(arguments.output or report.default_path("input_pipeline"), rows, COLUMNS)


if __name__ == "__main__":
    main()
