"""How many BERT examples a second a whole training step takes, beside tf-models' own trainer.

    python benchmarks/train_step.py --model=tiny --batch=32 --rounds=7

The contenders train the same model dimensions with LAMB, clipped to a global norm of 1, in float32
on the same TFRecord files (made here, of random tokens, every example full), each through its own
input pipeline: ours with the step as a graph and compiled by XLA, and tf-models' MaskedLMTask in
its own Trainer. Both are Orbit trainers: a round makes each of them do a few updates in one call,
in another order each time. Rates are by the clock, and by the CPU time of the whole process,
threads included, which other work on the machine disturbs less. Writes a CSV and prints a table,
with the time from nothing to the end of the first update, and the updates after which XLA's
compilation has paid back.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # measures this checkout

import orbit
import tensorflow as tf
from absl import logging
from official.core import base_trainer, config_definitions
from official.modeling import optimization
from official.nlp.configs import bert as bert_configs
from official.nlp.configs import encoders
from official.nlp.data import pretrain_dataloader
from official.nlp.tasks import masked_lm

from benchmarks import report
from benchmarks.input_pipeline import write_records
from benchmarks.report import progress
from lamb_tf.exclusions import BERT_EXCLUSIONS
from pretraining import data, model, vocabulary
from pretraining.batch_plan import BatchPlan
from pretraining.config import Config
from pretraining.optimization import build_optimizer
from pretraining.record_checks import RecordCheck
from pretraining.record_format import RecordFormat
from pretraining.train_step import PretrainingStep, SkippedSteps, Trainer

PEER = "tf-models MaskedLMTask"
GRAPH, XLA = "lamb_tf", "lamb_tf XLA"
PACKAGES = ("tensorflow", "tf-models-official", "tf-keras")
COLUMNS = (
    "contender examples_per_sec examples_per_cpu_sec of_peer first_step_s xla_pays_back_after "
    "model vocab_size max_seq_length max_predictions_per_seq batch rounds steps "
    "tensorflow tf-models-official tf-keras lamb_tf machine command date"
).split()
CLIP, EXAMPLES, SHARDS = 1.0, 2048, 2


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every contender trains: a model, its vocabulary, records, and rows of an update."""

    bert: model.BertConfig
    words: vocabulary.Vocabulary
    paths: list[str]
    record_format: RecordFormat
    batch: int


def ours(work: Workload, jit_compile: bool) -> orbit.AbstractTrainer:
    """Returns the trainer that a run of this package would use."""
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        network = model.build_pretrainer(work.bert, len(work.words))
        optimizer = build_optimizer(Config())
        optimizer.build(network.trainable_variables)
        skipped = SkippedSteps()
    plan = BatchPlan(global_batch_size=work.batch, num_replicas=1)
    checked = RecordCheck(record_format=work.record_format, flag="records").run(work.paths)
    held = data.Data(
        words=work.words, record_format=work.record_format, train=checked, held_out=None
    )
    batches = strategy.distribute_datasets_from_function(held.train_input(plan, 1, 0))
    step = PretrainingStep(
        network,
        optimizer,
        skipped=skipped,
        seed=1,
        accumulation_steps=1,
        clip_global_norm=CLIP,
        jit_compile=jit_compile,
    )
    return Trainer(strategy, step, iter(batches))


def theirs(work: Workload) -> orbit.AbstractTrainer:
    """Returns tf-models' trainer with its pre-training task; it compiles with XLA on GPUs only."""
    config = config_definitions.ExperimentConfig(
        task=_task_config(work),
        trainer=config_definitions.TrainerConfig(optimizer_config=_optimizer_config()),
        runtime=config_definitions.RuntimeConfig(enable_xla=True),
    )
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        task = masked_lm.MaskedLMTask(config.task)
        return base_trainer.Trainer(
            config,
            task,
            model=task.build_model(),
            optimizer=task.create_optimizer(config.trainer.optimizer_config, config.runtime),
            evaluate=False,
        )


def _task_config(work: Workload) -> masked_lm.MaskedLMConfig:
    bert, lengths = work.bert, work.record_format
    encoder = encoders.BertEncoderConfig(
        vocab_size=len(work.words),
        hidden_size=bert.hidden_size,
        num_layers=bert.num_hidden_layers,
        num_attention_heads=bert.num_attention_heads,
        intermediate_size=bert.intermediate_size,
        dropout_rate=bert.hidden_dropout_prob,
        attention_dropout_rate=bert.attention_probs_dropout_prob,
        max_position_embeddings=bert.max_position_embeddings,
        type_vocab_size=bert.type_vocab_size,
    )
    head = bert_configs.ClsHeadConfig(
        inner_dim=bert.hidden_size,
        num_classes=2,
        dropout_rate=bert.hidden_dropout_prob,
        name="next_sentence",
    )
    return masked_lm.MaskedLMConfig(
        model=bert_configs.PretrainerConfig(
            encoder=encoders.EncoderConfig(type="bert", bert=encoder), cls_heads=[head]
        ),
        train_data=pretrain_dataloader.BertPretrainDataConfig(
            input_path=",".join(work.paths),
            seq_length=lengths.max_seq_length,
            max_predictions_per_seq=lengths.max_predictions_per_seq,
            global_batch_size=work.batch,
        ),
    )


def _optimizer_config() -> optimization.OptimizationConfig:
    ours = Config()
    lamb = {
        "weight_decay_rate": ours.weight_decay,
        "exclude_from_weight_decay": list(BERT_EXCLUSIONS),
        "global_clipnorm": CLIP,
    }
    decay = {
        "initial_learning_rate": ours.learning_rate[0],
        "decay_steps": ours.num_train_steps[0],
        "end_learning_rate": ours.end_learning_rate[0],
    }
    warmup = {"type": "polynomial", "polynomial": {"warmup_steps": ours.warmup_steps[0]}}
    return optimization.OptimizationConfig(
        {
            "optimizer": {"type": "lamb", "lamb": lamb},
            "learning_rate": {"type": "polynomial", "polynomial": decay},
            "warmup": warmup,
        }
    )


def start(make: Callable[[], orbit.AbstractTrainer]) -> tuple[orbit.AbstractTrainer, float]:
    """Returns a trainer that has made its first update, and the seconds that this took."""
    began = time.perf_counter()
    trainer = make()
    trainer.train(tf.constant(1))
    return trainer, time.perf_counter() - began


def measure(trainer: orbit.AbstractTrainer, steps: int, batch: int) -> dict[str, float]:
    """Times some updates made in one call."""
    clock, cpu = time.perf_counter(), time.process_time()
    trainer.train(tf.constant(steps))
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    return {
        "examples_per_sec": steps * batch / seconds,
        "examples_per_cpu_sec": steps * batch / cpu_seconds,
    }


def run_rounds(
    trainers: dict[str, orbit.AbstractTrainer], arguments: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Measures every trainer once in each round, in an order of the round's own."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    order = random.Random(0)
    for trainer in trainers.values():
        trainer.train(tf.constant(arguments.steps))  # to warm up
    for number in range(arguments.rounds):
        for name in order.sample(list(trainers), len(trainers)):
            results[name].append(measure(trainers[name], arguments.steps, arguments.batch))
        progress(f"round {number + 1} of {arguments.rounds}")
    return results


def summarise(
    results: dict[str, list[dict[str, float]]], first_step: dict[str, float], batch: int
) -> list[dict]:
    """Returns a row of medians for each contender."""
    rows = []
    for name, rounds in results.items():
        medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        rows.append(
            {
                "contender": name,
                "examples_per_sec": round(medians["examples_per_sec"], 1),
                "examples_per_cpu_sec": round(medians["examples_per_cpu_sec"], 1),
                "of_peer": round(ratio(rounds, results[PEER]), 3),
                "first_step_s": round(first_step[name], 1),
            }
        )
        if name == XLA:
            cost = first_step[XLA] - first_step[GRAPH]
            faster = ratio(rounds, results[GRAPH])
            gained = (faster - 1.0) * batch / medians["examples_per_sec"]
            after = max(0, round(cost / gained)) if gained > 0 else "never"
            rows[-1]["xla_pays_back_after"] = after
    return rows


def ratio(rounds: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    """Returns the median ratio of rates of the same round, between which the machine may change."""
    name = "examples_per_sec"
    return statistics.median(a[name] / b[name] for a, b in zip(rounds, others, strict=True))


def parse_arguments() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=model.MODELS, default="tiny")
    parser.add_argument("--vocab_size", type=int, default=30522)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--max_predictions_per_seq", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="updates in a round, in one call")
    parser.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/...")
    arguments = parser.parse_args()
    arguments.examples, arguments.shards = EXAMPLES, SHARDS
    return arguments


def make_workload(arguments: argparse.Namespace, folder: pathlib.Path) -> Workload:
    """Writes records and a vocabulary."""
    special = vocabulary.SPECIAL_TOKENS
    made_up = (f"w{i}" for i in range(arguments.vocab_size - len(special)))
    words = vocabulary.Vocabulary((*special, *made_up))
    bert = model.MODELS[arguments.model]
    record_format = RecordFormat(
        max_seq_length=arguments.max_seq_length,
        max_predictions_per_seq=arguments.max_predictions_per_seq,
        vocab_size=len(words),
        type_vocab_size=bert.type_vocab_size,
    )
    paths = write_records(folder, arguments, len(words))
    return Workload(bert, words, paths, record_format, arguments.batch)


def main() -> None:
    """Runs the benchmark."""
    arguments = parse_arguments()
    logging.set_verbosity(logging.ERROR)  # the unused pooler of tf-models, each time
    warnings.filterwarnings("ignore", "Input dict contained keys")
    with tempfile.TemporaryDirectory() as folder:
        work = make_workload(arguments, pathlib.Path(folder))
        makers = {
            PEER: lambda: theirs(work),
            GRAPH: lambda: ours(work, False),
            XLA: lambda: ours(work, True),
        }
        tf.function(lambda x: x + 1.0)(0.0)  # what TensorFlow does once is nobody's first step
        trainers, first_step = {}, {}
        for name in makers:
            trainers[name], first_step[name] = start(makers[name])
            progress(f"{name}: first update after {first_step[name]:.1f} s")
        results = run_rounds(trainers, arguments)
    rows = summarise(results, first_step, arguments.batch)
    print_table(rows)
    given = {name: value for name, value in vars(arguments).items() if name in COLUMNS}
    path = arguments.output or report.default_path(f"train_step_{arguments.model}")
    facts = {**given, **report.facts(PACKAGES)}
    report.write_csv(path, [{**row, **facts} for row in rows], COLUMNS)


def print_table(rows: list[dict]) -> None:
    """Prints what the CSV holds beside the facts."""
    print(f"{'':26}{'examples/s':>12}{'a CPU s':>10}{'of peer':>9}{'first update s':>16}")
    for row in rows:
        print(
            f"{row['contender']:26}{row['examples_per_sec']:>12,}{row['examples_per_cpu_sec']:>10,}"
            f"{row['of_peer']:>9.2f}{row['first_step_s']:>16.1f}"
        )
        if "xla_pays_back_after" in row:
            print(f"XLA has paid back after {row['xla_pays_back_after']} updates")


if __name__ == "__main__":
    main()
