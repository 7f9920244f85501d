"""Two logical CPUs for the whole session, and small records for the tests of pre-training."""

import dataclasses
import json
import os
import pathlib
import random
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# No waiting between TensorFlow's tries at gs://, which reads this when it is imported.
os.environ.setdefault("GCS_RETRY_CONFIG_INIT_DELAY_TIME_US", "0")

import pytest
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

from pretraining import examples, vocabulary

LENGTH, PREDICTIONS = 32, 5
EXIT_STATUS = pytest.StashKey[int]()
WORDS = [f"word{i}" for i in range(60)]


@dataclasses.dataclass(frozen=True)
class RecordsOnDisk:
    """Small records of a made-up language, and the files that go with them."""

    folder: pathlib.Path
    words: vocabulary.Vocabulary

    @property
    def flags(self) -> list[str]:
        """The flags that train the smallest of models on them."""
        return [
            f"--input_files={self.folder}/train-*.tfrecord",
            f"--eval_files={self.folder}/eval.tfrecord",
            f"--vocab_file={self.folder}/vocab.txt",
            f"--bert_config_file={self.folder}/bert_config.json",
            f"--max_seq_length={LENGTH}",
            f"--max_predictions_per_seq={PREDICTIONS}",
            "--train_batch_size=8",
        ]


def made_up_documents(count: int, seed: int) -> list[list[list[int]]]:
    """Documents in which the next word follows from the last one, nearly always."""
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        document = []
        for _ in range(rng.randint(2, 8)):
            word, sentence = rng.randrange(len(WORDS)), []
            for _ in range(rng.randint(3, 12)):
                sentence.append(5 + word)
                word = (word * 7 + 3) % len(WORDS) if rng.random() < 0.9 else rng.randrange(60)
            document.append(sentence)
        documents.append(document)
    return documents


def write_records(path, documents, words, seed=1, duplicates=1):
    """Writes the examples of documents; returns how many there are."""
    settings = examples.ExampleSettings(
        max_seq_length=LENGTH, max_predictions_per_seq=PREDICTIONS, dupe_factor=duplicates
    )
    built = list(examples.build_examples(documents, words, settings, seed))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in built:
            writer.write(examples.serialize(example))
    return len(built)


@pytest.fixture(scope="session")
def small_records(tmp_path_factory) -> RecordsOnDisk:
    """Three training files, one held-out file, a vocabulary and a model without dropout."""
    folder = tmp_path_factory.mktemp("records")
    words = vocabulary.Vocabulary((*vocabulary.SPECIAL_TOKENS, *WORDS))
    vocabulary.write_vocabulary(words, str(folder / "vocab.txt"))
    for shard in range(3):
        write_records(
            folder / f"train-{shard}.tfrecord", made_up_documents(20 + shard, shard), words
        )
    write_records(folder / "eval.tfrecord", made_up_documents(9, 100), words)
    (folder / "bert_config.json").write_text(
        json.dumps(
            {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "vocab_size": 65,
            }
        )
    )
    return RecordsOnDisk(folder, words)


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Ends the process without TensorFlow's tear-down of distributed inputs, which may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    if EXIT_STATUS in config.stash:
        os._exit(config.stash[EXIT_STATUS])
