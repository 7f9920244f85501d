"""What a manifest says of a set of records, and sets made in one process from a few documents."""

import dataclasses
import importlib.metadata
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pretraining import block_files, manifest, record_format, shards
from pretraining.block_files import Making
from pretraining.errors import InputError
from pretraining.examples import ExampleSettings
from pretraining.files import make_folder
from pretraining.vocabulary import Vocabulary

# What the bytes of records may depend on.
VERSIONS = ("tensorflow", "tensorflow-text", "numpy")


def versions() -> dict[str, str]:
    """The versions of the packages that records are made with."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def check_documents(facts: Sequence[dict[str, Any]], what: str) -> None:
    """Refuses text without a second document.

    Args:
      facts: of all blocks.
      what: names the text in the error message.

    Raises:
      InputError: there are no two documents with tokens.
    """
    numbers = [number for block in facts for number in block.get("numbers", ())]
    if len(set(numbers)) < 2:
        raise InputError(
            f"{what}: expected at least two documents, because a random second segment is from "
            f"another one than the first. Received: {'a single one' if numbers else 'no tokens'}"
        )


def total(facts: Sequence[dict[str, Any]], done: Sequence[dict[str, Any]]) -> Counter[str]:
    """Adds up what is known of blocks and of shards."""
    counts: Counter[str] = Counter()
    last = None
    for block in facts:
        for name in ("documents", "sentences", "tokens", "unknown_tokens", "bad_bytes"):
            counts[name] += block.get(name, 0)
        if "numbers" in block:
            counts["documents"] -= block["numbers"][0] == last  # it goes on from the block before
            last = block["numbers"][1]
    counts["examples"] = sum(shard["records"] for shard in done)
    counts["example_tokens"] = sum(shard["tokens"] for shard in done)
    counts["random_next"] = sum(shard["random"] for shard in done)
    counts["actual_next"] = counts["examples"] - counts["random_next"]
    counts["masked_tokens"] = sum(shard["masked"] for shard in done)
    return counts


def describe(
    making: Making, masked: str, done: Sequence[dict[str, Any]], counts: Counter[str]
) -> dict[str, Any]:
    """Returns the manifest of a set of records, but for its settings and its input.

    Args:
      making: vocabulary and settings.
      masked: "static" or "dynamic".
      done: what `ShardWriter.write` returned for each shard.
      counts: from `total`.
    """
    labels: Counter[int] = Counter()
    for shard in done:
        labels.update({int(token): n for token, n in shard["label_counts"].items()})
    keys = {name: names[0] for name, names in record_format.RECORD_KEYS.items()}
    if masked == "dynamic":
        keys = {name: key for name, key in keys.items() if not name.startswith("masked")}
    settings = making.settings
    return {
        "shards": [
            {name: shard[name] for name in ("name", "records", "bytes", "crc32", "offsets")}
            for shard in done
        ],
        "window": shards.WINDOW,
        "max_seq_length": settings.max_seq_length,
        "max_predictions_per_seq": settings.max_predictions_per_seq,
        "masking": masked,
        "masked_lm_prob": settings.masked_lm_prob,
        "do_whole_word_mask": settings.do_whole_word_mask,
        "vocab": {"sha256": making.vocabulary.sha256, "size": len(making.vocabulary)},
        "keys": keys,
        "label_counts": {str(token): labels[token] for token in sorted(labels)},
        "counts": dict(counts),
        "lengths": [sum(column) for column in zip(*(s["lengths"] for s in done), strict=True)],
        "versions": versions(),
    }


def make_records(
    documents: Sequence[Sequence[str]],
    words: Vocabulary,
    settings: ExampleSettings,
    folder: str,
    *,
    masking: str = "static",
    num_shards: int = 1,
    do_lower_case: bool = True,
    name: str = "records",
    what: str = "the text",
) -> dict[str, Any]:
    """Makes records and their manifest in this process, for text that is small.

    Args:
      documents: the sentences of each document.
      words: the vocabulary.
      settings: how examples are cut and masked.
      folder: local or gs://; is made if it is not there.
      masking: "static" or "dynamic".
      num_shards: number of files.
      do_lower_case: whether text is lower-cased and stripped of accents.
      name: the files' names begin with it.
      what: names the text in an error message.

    Returns:
      The manifest's values.

    Raises:
      InputError: fewer than two documents hold tokens.
    """
    making = Making(vocabulary=words, do_lower_case=do_lower_case, settings=settings)
    arranged, counts = block_files.tokenize(making, list(enumerate(documents)), True)
    make_folder(folder)
    writer, done = shards.ShardWriter(making, masking), []
    with tempfile.TemporaryDirectory() as scratch:
        facts = block_files.write_block(making, arranged, 0, f"{scratch}/block", counts)
        check_documents([facts], what)
        files = [f"{scratch}/block"]
        if facts["borrows"]:
            files = [f"{scratch}/examples"]
            block_files.finish_block(making, 0, f"{scratch}/block", [], files[0])
        for shard in shards.plan(files, num_shards, name):
            unfinished = f"{folder}/.{shard.name}.unfinished"
            done.append(writer.write(shard, files, unfinished))
            shards.finish(done[-1], unfinished, f"{folder}/{shard.name}", f"{scratch}/note")
    values = {
        **describe(making, masking, done, total([facts], done)),
        "settings": {**dataclasses.asdict(settings), "do_lower_case": do_lower_case},
        "input": [],
    }
    manifest.write(folder, values)
    return values
