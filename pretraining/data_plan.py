"""What make_data is asked for, as a plan: compared with what is there, and sizes worked out."""

import concurrent.futures
import dataclasses
import os
from typing import Any

import numpy as np
import tensorflow as tf

from pretraining import console, corpus, manifest, record_sets, vocabulary
from pretraining.errors import InputError
from pretraining.files import make_folder, why
from pretraining.make_data import DataConfig
from pretraining.scratch_folder import ScratchFolder, differences

LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 1 << 21, 1 << 23
EXAMPLE_TEXT = 1 << 27  # bytes of a block, times how often it is used
SHARD_BYTES = 48e6
MOST_SHARDS = 1 << 13
# Input bytes from which on there are at least so many shards, for as many readers.
LEAST_SHARDS = ((20e9, 256), (20e6, 16), (0, 1))
FEW_SHARDS = 8  # at most, for less input than that


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
      sources: the text files.
      words: the vocabulary.
      plan: all that the output depends on, as plain values.
    """

    sources: list[corpus.Source]
    words: vocabulary.Vocabulary
    plan: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of text on disk."""
        return sum(source.size for source in self.sources)


def read_inputs(config: DataConfig) -> Inputs:
    """Finds the text and reads the vocabulary."""
    words = vocabulary.read_vocabulary(config.vocab_file)
    sources = corpus.find_sources(config.input, config.input_format)
    with concurrent.futures.ThreadPoolExecutor(corpus.THREADS) as threads:
        files = list(threads.map(_describe, sources))
    plan = {
        "settings": config.settings,
        "input": files,
        "vocab": {"sha256": words.sha256, "size": len(words)},
    }
    return Inputs(sources, words, plan)


def _describe(source: corpus.Source) -> dict[str, Any]:
    modified = tf.io.gfile.stat(source.path).mtime_nsec
    return {
        "path": source.path,
        "format": source.format,
        "bytes": source.size,
        "modified": modified,
    }


def is_complete(config: DataConfig, output_dir: str, inputs: Inputs | None = None) -> bool:
    """Tells, and says, whether the output folder holds what the flags ask for.

    Raises:
      InputError: it holds the data of other flags, or not all of its data.
    """
    made = manifest.read(output_dir, "--output_dir")
    if made is None:
        return False
    changed = differences(made.values, (inputs or read_inputs(config)).plan)
    if changed:
        raise InputError(
            f"--output_dir={output_dir}: holds the data of other settings: {'; '.join(changed)}. "
            "Expected those settings, or another --output_dir"
        )
    for path, shard in made.shards().items():
        if not tf.io.gfile.exists(path) or tf.io.gfile.stat(path).length != shard.size:
            raise InputError(
                f"--output_dir={output_dir}: expected {path} with {shard.size} bytes, as "
                f"{made.path} says. Received: another file, or none. Remove manifest.json and the "
                "records to make them again"
            )
    console.say(f"{made.path} is there, with these settings and this input: nothing to do")
    return True


def begin(inputs: Inputs, output_dir: str, scratch: ScratchFolder) -> None:
    """Writes the plan, or goes on with the one that is there."""
    plan = {**inputs.plan, "versions": record_sets.versions()}
    then = scratch.read("plan.json")
    if then is None:
        scratch.clear()
    changed = differences(then, plan) if then else []
    if changed:
        raise InputError(
            f"--output_dir={output_dir}: holds unfinished work of other settings: "
            f"{'; '.join(changed)}. Expected those settings, another --output_dir, or that you "
            f"remove {scratch.path} and the records beside it"
        )
    try:
        make_folder(output_dir)
        present = [n for n in tf.io.gfile.listdir(output_dir) if ".tfrecord" in n and n[0] != "."]
    except tf.errors.OpError as error:
        raise InputError(
            f"--output_dir={output_dir}: {why(error, output_dir, 'written')}"
        ) from None
    foreign = sorted(n for n in present if not os.path.exists(scratch.note(n)))
    if foreign:
        raise InputError(
            f"--output_dir={output_dir}: expected a folder without records of other programs. "
            f"Received: one with {foreign[0]}"
            + (f" and {len(foreign) - 1} more" * (len(foreign) > 1))
        )
    scratch.write("plan.json", plan)


def block_bytes(size: int, dupe_factor: int) -> int:
    """Works out the size of blocks: the examples depend on it, so it depends on the input alone.

    Args:
      size: bytes of input.
      dupe_factor: the examples of all duplicates of a block are in memory at once.
    """
    most = min(MOST_BLOCK_BYTES, EXAMPLE_TEXT // dupe_factor)
    return min(max(size >> 8, LEAST_BLOCK_BYTES), most)


def num_shards(size: int, examples: int, config: DataConfig) -> int:
    """Works out how many shards to make: a power of two, of 34 to 68 MB each where that is enough.

    Args:
      size: bytes of input.
      examples: how many there are.
      config: says how large a record is.
    """
    values = 4.3 * config.max_seq_length + 150
    if config.masking == "static":
        values += 7.5 * config.max_predictions_per_seq + 80
    wanted = int(2 ** round(np.log2(max(1.0, examples * values / SHARD_BYTES))))
    least = next(count for limit, count in LEAST_SHARDS if size >= limit)
    most = FEW_SHARDS if least == 1 else MOST_SHARDS
    count = min(max(wanted, least), most)
    return min(count, 1 << (examples.bit_length() - 1))
