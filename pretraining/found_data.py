"""The data of a run without `--input_files`: found prose, made into records once.

In `<output_dir>/data` stand `train.txt` and `eval.txt` (a sentence a line, a blank line between
documents), `vocab.txt`, and the folders `train` and `eval` of records, for a run of several phases
`train-128`, `eval-128` and so on, by their length. They are made in a folder beside
it that gets this name when all is done, so what is there is whole.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from pretraining import (
    console,
    examples,
    files,
    found_text,
    manifest,
    record_sets,
    vocabulary,
    vocabulary_learning,
)
from pretraining.config import Config
from pretraining.data import DataFiles
from pretraining.errors import InputError
from pretraining.sentence_splitting import split_sentences

TARGET_BYTES = 4_500_000
LEAST_BYTES = 3_000_000
HELD_OUT_ONE_IN = 20
VOCAB_SIZE = 4000
DUPE_FACTOR = 4
NUM_SHARDS = 4

Documents = list[list[str]]  # the sentences of each document


def prepare(config: Config) -> list[DataFiles]:
    """Makes records from the prose of this installation, or finds those made before; by phase.

    Raises:
      InputError: the folder holds something else, or records that were made with other settings;
        or the installation holds too little text.
    """
    folder = config.output_dir.rstrip("/") + "/data"
    settings = {
        "max_seq_length": list(config.max_seq_length),
        "max_predictions_per_seq": list(config.max_predictions_per_seq),
        "seed": config.seed,
    }
    if not tf.io.gfile.exists(folder) and config.mode != "eval":
        unfinished = config.output_dir.rstrip("/") + "/.data_unfinished"
        if tf.io.gfile.exists(unfinished):
            tf.io.gfile.rmtree(unfinished)
        files.make_folder(unfinished)
        facts = _make(unfinished, config)
        with tf.io.gfile.GFile(f"{unfinished}/prepared.json", "w") as file:
            json.dump({**settings, **facts}, file, indent=2)
        tf.io.gfile.rename(unfinished, folder)
    return prepared_files(folder, settings)


def _parts(lengths: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the names of the folders of each phase."""
    if len(lengths) == 1:
        return [("train", "eval")]
    return [(f"train-{length}", f"eval-{length}") for length in lengths]


def prepared_files(folder: str, settings: dict[str, Any]) -> list[DataFiles]:
    """Returns the files that `prepare` made.

    Raises:
      InputError: the folder holds something else, or records that were made with other settings.
    """
    try:
        with tf.io.gfile.GFile(f"{folder}/prepared.json") as file:
            then = json.load(file)
        size = then["bytes"]
        changed = [
            f"{name} was {then[name]}, is {value}"
            for name, value in settings.items()
            if then[name] != value
        ]
    except (tf.errors.OpError, ValueError, KeyError, TypeError):
        raise InputError(
            f"--output_dir: expected {folder} to be absent or to hold the data that an earlier run "
            "prepared there. Received: something else, or a damaged prepared.json"
        ) from None
    if changed:
        raise InputError(
            f"--output_dir: the data in {folder} was made with other flags: --{'; --'.join(changed)}. "
            "Expected those flags, or another --output_dir"
        )
    console.say(f"Data: {folder}, from {size / 1e6:.1f} MB of text")
    phases = []
    for parts in _parts(settings["max_seq_length"]):
        train, held_out = (files.find_files(f"{folder}/{part}", "--output_dir") for part in parts)
        for part, found in zip(parts, (train, held_out), strict=True):
            manifest.missing_files(f"{folder}/{part}", found, "--output_dir")
        phases.append(DataFiles(train, held_out, f"{folder}/vocab.txt"))
    return phases


def _make(folder: str, config: Config) -> dict[str, int]:
    train, held_out = split_documents(_find())
    for name, documents in (("train", train), ("eval", held_out)):
        with tf.io.gfile.GFile(f"{folder}/{name}.txt", "w") as file:
            file.write("\n\n".join("\n".join(document) for document in documents) + "\n")
    console.say(
        f"Text: {len(train)} documents of {_size(train) / 1e6:.1f} MB to train on, "
        f"{len(held_out)} of {_size(held_out) / 1e6:.2f} MB held out"
    )
    with console.timed(
        f"Vocabulary of up to {VOCAB_SIZE} word pieces, learnt from the training text"
    ):
        counts = vocabulary_learning.count_words(
            [sentence for document in train for sentence in document]
        )
        words = vocabulary_learning.learn_vocabulary(counts, VOCAB_SIZE)
    vocabulary.write_vocabulary(words, f"{folder}/vocab.txt")
    # Phases of one length and number of predictions share their records.
    kinds = dict.fromkeys(
        zip(
            _parts(config.max_seq_length),
            config.max_seq_length,
            config.max_predictions_per_seq,
            strict=True,
        )
    )
    for parts, length, predictions in kinds:
        for name, documents, shards, duplicates in (
            (parts[0], train, NUM_SHARDS, DUPE_FACTOR),
            (parts[1], held_out, 1, 1),
        ):
            with console.timed(f"Records in {name}"):
                record_sets.make_records(
                    documents,
                    words,
                    examples.ExampleSettings(
                        dupe_factor=duplicates,
                        random_seed=config.seed,
                        max_seq_length=length,
                        max_predictions_per_seq=predictions,
                    ),
                    f"{folder}/{name}",
                    num_shards=shards,
                    what=f"{folder}/{name.split('-')[0]}.txt",
                )
    return {
        "bytes": _size(train) + _size(held_out),
        "train_documents": len(train),
        "eval_documents": len(held_out),
    }


def _find() -> list[tuple[str, list[str]]]:
    with console.progress("Finding text", TARGET_BYTES, "B", scale=True) as bar:
        found = list(
            found_text.find_documents(
                TARGET_BYTES, lambda size: bar.update(min(size, TARGET_BYTES) - bar.n)
            )
        )
    size = sum(len(paragraph.encode()) for _, paragraphs in found for paragraph in paragraphs)
    if size < LEAST_BYTES:
        raise InputError(
            f"--input_files: expected, because this Python installation holds {size / 1e6:.1f} MB "
            f"of prose and {LEAST_BYTES / 1e6:.0f} MB are needed. Received: nothing"
        )
    return found


def _size(documents: Documents) -> int:
    return sum(len(sentence.encode()) + 1 for document in documents for sentence in document)


def _is_held_out(name: str) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def split_documents(found: Sequence[tuple[str, list[str]]]) -> tuple[Documents, Documents]:
    """Splits paragraphs into sentences and documents into training and held-out ones.

    A document's name decides on which side it falls, so the split does not move when another
    package is installed. A held-out document loses the sentences that training documents hold
    too, so that no sentence stands on both sides.

    Args:
      found: (name, paragraphs) of each document.

    Returns:
      (training documents, held-out documents), each a list of sentences.
    """
    sentences = iter(split_sentences(p for _, paragraphs in found for p in paragraphs))
    train: Documents = []
    held_out: Documents = []
    for name, paragraphs in found:
        document = [s for _ in paragraphs for s in next(sentences)]
        (held_out if _is_held_out(name) else train).append(document)
    seen = {sentence.lower() for document in train for sentence in document}
    kept = ([s for s in document if s.lower() not in seen] for document in held_out)
    return train, [document for document in kept if document]
