"""`manifest.json`: what is known of the records beside it, so that a start need not read them."""

import dataclasses
import fnmatch
import itertools
import json
import posixpath
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from pretraining import files
from pretraining.errors import InputError
from pretraining.files import why
from pretraining.record_format import RecordFormat
from pretraining.records import DynamicMasking, RecordSet, Shard, dense_counts
from pretraining.vocabulary import Vocabulary

NAME = "manifest.json"
FORMAT = 1


def write(folder: str, values: dict[str, Any]) -> None:
    """Writes `manifest.json`, which is whole or not there."""
    text = json.dumps({"format": FORMAT, **values}, indent=1)
    files.write(posixpath.join(folder, NAME), text + "\n")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest that has been read.

    Attributes:
      folder: where it and its records stand.
      values: its content.
    """

    folder: str
    values: dict[str, Any]

    @property
    def path(self) -> str:
        """The file that was read."""
        return posixpath.join(self.folder, NAME)

    def shards(self) -> dict[str, Shard]:
        """Every file of the manifest, by path."""
        return {
            path: Shard(path, s["records"], s["bytes"], s["crc32"], tuple(s["offsets"]))
            for s in self.values["shards"]
            for path in [posixpath.join(self.folder, s["name"])]
        }

    def check(self, record_format: RecordFormat, words: Vocabulary, flag: str) -> None:
        """Compares what the records were made with to what a run expects.

        Raises:
          InputError: names the first thing that differs.
        """
        made, where = self.values, f"{flag}={self.path}"
        if made["vocab"]["sha256"] != words.sha256:
            raise InputError(
                f"--vocab_file: expected the vocabulary that {where} was made with, "
                f"{made['vocab']['size']} tokens, sha256 {made['vocab']['sha256'][:12]}. Received: "
                f"{len(words)} tokens, sha256 {words.sha256[:12]}"
            )
        for name in ("max_seq_length", "max_predictions_per_seq"):
            given = getattr(record_format, name)
            if name == "max_predictions_per_seq" and made["masking"] == "dynamic":
                continue  # the input pipeline makes as many as the run asks for
            if made[name] != given:
                raise InputError(
                    f"--{name}={given}: expected {made[name]}, as {where} was made. Received: {given}"
                )


def read(folder: str, flag: str) -> Manifest | None:
    """Reads the manifest of a folder, None where there is none.

    Raises:
      InputError: there is one and it is damaged.
    """
    path = posixpath.join(folder, NAME)
    try:
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path) as file:
            values = json.load(file)
        if values["format"] != FORMAT:
            raise InputError(
                f"{flag}={path}: expected format {FORMAT}. Received: {values['format']}"
            )
        manifest = Manifest(folder, values)
        for shard in manifest.shards().values():
            _check_offsets(shard, values["window"])
        _ = [values[k] for k in ("window", "keys", "label_counts", "masking", "vocab")]
    except tf.errors.OpError as error:
        raise InputError(f"{flag}={path}: {why(error, path, 'read')}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{flag}={path}: expected the manifest that make_data wrote. Received: something else "
            f"({type(error).__name__}: {error})"
        ) from None
    return manifest


def _check_offsets(shard: Shard, window: int) -> None:
    """Raises `ValueError` where the windows of a shard cannot be where the manifest says."""
    places = [*shard.offsets, shard.size]
    windows = -(-shard.records // window)
    ascending = all(a < b for a, b in itertools.pairwise(places))
    if len(shard.offsets) != windows or places[0] != 0 or not ascending:
        raise ValueError(
            f"{shard.path}: {windows} ascending offsets from 0 on are wanted for {shard.records} records"
        )


def manifests_of(paths: Sequence[str], flag: str) -> list[Manifest] | None:
    """Returns the manifests that know all of these files, None where one has no manifest.

    Raises:
      InputError: a manifest knows some of the files beside it and not others.
    """
    found = []
    for folder in sorted({posixpath.dirname(path) for path in paths}):
        manifest = read(folder, flag)
        known = set(manifest.shards()) if manifest else set()
        here = [path for path in paths if posixpath.dirname(path) == folder]
        unknown = [path for path in here if path not in known]
        if manifest is None or len(unknown) == len(here):
            return None
        if unknown:
            raise InputError(
                f"{flag}={unknown[0]}: expected one of the {len(known)} files that {manifest.path} lists. "
                "Received: another one; name the files that are meant, or keep it elsewhere"
            )
        found.append(manifest)
    return found


def missing_files(patterns: str, found: Sequence[str], flag: str) -> None:
    """Refuses a set of which a file in the manifest is not there.

    Args:
      patterns: what the flag said, in which folders and globs stand for all that they match.
      found: what was found.
      flag: named in the error message.

    Raises:
      InputError: names the file that is missing.
    """
    folders = {posixpath.dirname(path) for path in found} | {
        pattern.strip().rstrip("/") for pattern in patterns.split(",")
    }
    there = set(found)
    for folder in sorted(folders):
        manifest = read(folder, flag)
        for path, shard in manifest.shards().items() if manifest else ():
            if path not in there and _asked_for(path, patterns, folder):
                raise InputError(
                    f"{flag}={path}: expected the file with {shard.records} records that "
                    f"{manifest.path} lists. Received: no such file"
                )


def _asked_for(path: str, patterns: str, folder: str) -> bool:
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    return any(p.rstrip("/") == folder or fnmatch.fnmatch(path, p) for p in wanted)


def record_set(
    paths: Sequence[str], manifests: Sequence[Manifest], vocab_size: int, flag: str
) -> RecordSet:
    """Returns the set of records that these files are, by their manifests alone.

    Raises:
      InputError: the manifests disagree on how records are masked or named.
    """
    known = {path: shard for manifest in manifests for path, shard in manifest.shards().items()}
    first = manifests[0]
    for other in manifests[1:]:
        for name in ("keys", "masking", "masked_lm_prob", "do_whole_word_mask", "window"):
            if other.values.get(name) != first.values.get(name):
                raise InputError(
                    f"{flag}: expected records that were made alike. Received: {name} "
                    f"{first.values.get(name)} in {first.path}, {other.values.get(name)} in {other.path}"
                )
    masking = None
    if first.values["masking"] == "dynamic":
        masking = DynamicMasking(first.values["masked_lm_prob"], first.values["do_whole_word_mask"])
    return RecordSet(
        shards=tuple(known[path] for path in paths),
        window=first.values["window"],
        keys=first.values["keys"],
        label_counts=sum(dense_counts(m.values["label_counts"], vocab_size) for m in manifests),
        masking=masking,
    )
