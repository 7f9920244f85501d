"""Looking at records: examples in words, statistics, and a check of every one."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from pretraining import console, files, manifest, record_reading
from pretraining.errors import InputError
from pretraining.input_pipeline import dynamic_masking
from pretraining.inspect_data import InspectConfig
from pretraining.record_checks import RecordCheck, decode_example
from pretraining.record_format import RECORD_KEYS, RecordFormat
from pretraining.record_statistics import RecordStatistics
from pretraining.records import DynamicMasking, RecordSet
from pretraining.vocabulary import Vocabulary, read_vocabulary

FLAG = "--input_files"
LEGEND = "Words to predict in braces: {word} became [MASK], {word>other} became another one, {word=} stays"


def inspect(config: InspectConfig) -> int:
    """Shows examples and statistics, and lists what is wrong.

    Returns:
      The number of faults.

    Raises:
      InputError: there is nothing to look at, or no vocabulary to look at it with.
    """
    words = read_vocabulary(config.vocab_file)
    paths = files.find_files(config.input_files, FLAG)
    faults: list[str] = []
    known, record_format = _known(config, paths, words, faults)
    statistics = RecordStatistics(words, config.examples)
    size = sum(tf.io.gfile.stat(path).length for path in paths)
    with console.progress("Reading", size, "B", scale=True) as bar:
        found = RecordCheck(
            record_format=record_format,
            flag=FLAG,
            known=known,
            on_corrupt=faults.append,
            on_progress=bar.update,
            on_records=statistics.add,
        ).run(paths)
    faults += statistics.faults
    _say_set(found, known, size, statistics)
    if statistics.examples:
        console.say(LEGEND)
    for where, example in statistics.examples:
        if known and known.masking:
            example = _masked(example, known.masking, words, config.seed)
        console.say(f"\n{where}: {_follows(example)}\n{spell(example, words)}")
    console.say()
    for line in statistics.lines():
        console.say(line)
    console.say()
    for fault in faults[: config.max_faults]:
        console.say(f"FAULT {fault}")
    more = len(faults) - config.max_faults
    if more > 0:
        console.say(f"... and {more} more")
    console.say(
        f"Faults: {len(faults)}, in {found.num_records} records"
        if faults
        else f"Every one of the {found.num_records} records fits the vocabulary and its checksums."
    )
    return len(faults)


def _known(
    config: InspectConfig, paths: Sequence[str], words: Vocabulary, faults: list[str]
) -> tuple[RecordSet | None, RecordFormat]:
    """Returns what manifests say, None without, and the lengths that the records should have."""
    manifests = None
    try:
        manifests = manifest.manifests_of(paths, FLAG)
        manifest.missing_files(config.input_files, paths, FLAG)
    except InputError as error:
        faults.append(str(error))
    if manifests is None:
        return None, _first_format(paths, words)
    made = manifests[0].values
    record_format = RecordFormat(
        max_seq_length=made["max_seq_length"],
        max_predictions_per_seq=made["max_predictions_per_seq"],
        vocab_size=len(words),
        type_vocab_size=2,
    )
    for each in manifests:
        try:
            each.check(record_format, words, FLAG)
        except InputError as error:
            faults.append(str(error))
    size = max(len(words), *(m.values["vocab"]["size"] for m in manifests))
    return manifest.record_set(paths, manifests, size, FLAG), record_format


def _first_format(paths: Sequence[str], words: Vocabulary) -> RecordFormat:
    """Takes the lengths from the first record that can be decoded."""
    for path in paths:
        for _, _, payloads in record_reading.runs(path, tf.io.gfile.stat(path).length):
            for payload in payloads[:1]:
                try:
                    features = decode_example(payload).features.feature
                except ValueError:
                    continue
                lengths = {
                    name: next(
                        (len(features[k].int64_list.value) for k in keys if k in features), 0
                    )
                    for name, keys in RECORD_KEYS.items()
                }
                return RecordFormat(
                    max_seq_length=lengths["input_word_ids"],
                    max_predictions_per_seq=lengths["masked_lm_positions"],
                    vocab_size=len(words),
                    type_vocab_size=2,
                )
    raise InputError(f"{FLAG}={paths[0]}: expected a TFRecord file. Received: other bytes, or none")


def _say_set(
    found: RecordSet, known: RecordSet | None, size: int, statistics: RecordStatistics
) -> None:
    source = "manifest.json is beside them" if known else "without a manifest.json"
    console.say(
        f"{len(found.shards)} files, {found.num_records} records, {size / 1e6:.1f} MB, {source}; "
        f"{len(found.lanes())} lanes"
    )
    if known and known.masking:
        what = "whole words" if known.masking.do_whole_word_mask else "tokens"
        console.say(
            f"Masks are drawn while training: {known.masking.masked_lm_prob:.0%} of the {what}; those "
            "shown are of the seed given"
        )


def _masked(
    example: dict[str, np.ndarray], settings: DynamicMasking, words: Vocabulary, seed: int
) -> dict[str, np.ndarray]:
    """Masks one example as the input pipeline would."""
    mask = dynamic_masking(settings, words, len(example["input_word_ids"]), seed)
    rows = {name: tf.constant(values[None], tf.int32) for name, values in example.items()}
    masked = mask(rows, tf.constant([0], tf.int64))
    return {name: values.numpy()[0] for name, values in masked.items()}


def _follows(example: dict[str, np.ndarray]) -> str:
    random = example["next_sentence_labels"][0]
    return "the second segment is of another document" if random else "the second segment follows"


def spell(example: dict[str, np.ndarray], words: Vocabulary) -> str:
    """Returns the text of an example, with the words to predict marked as `LEGEND` says."""
    predicted = {
        int(position): int(label)
        for position, label, weight in zip(
            example["masked_lm_positions"],
            example["masked_lm_ids"],
            example["masked_lm_weights"],
            strict=True,
        )
        if weight > 0
    }
    text = []
    for place in range(int(example["input_mask"].sum())):
        token = words.tokens[example["input_word_ids"][place]]
        label = words.tokens[predicted[place]] if place in predicted else token
        joined = label.startswith("##") and bool(text)
        shown = label.removeprefix("##") if joined else label
        if place in predicted:
            change = {"[MASK]": "", label: "="}.get(token, f">{token}")
            shown = f"{{{shown}{change}}}"
        if joined:
            text[-1] += shown
        else:
            text.append(shown)
    return " ".join(text)
