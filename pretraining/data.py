"""The vocabulary and the checked records of a run."""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from pretraining import console, files, records, vocabulary
from pretraining.config import Config
from pretraining.errors import InputError
from pretraining.model import BertConfig
from pretraining.record_checks import check_records
from pretraining.record_format import RecordFormat
from pretraining.run_directory import RunDirectory, writing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The checked records of a run.

    Attributes:
      words: the vocabulary.
      record_format: what every record holds.
      train: the training records, None for `--mode=eval`.
      held_out: the held-out records, None for `--mode=train`.
      fresh: the names of the flags whose records were checked just now.
    """

    words: vocabulary.Vocabulary
    record_format: RecordFormat
    train: records.RecordSet | None
    held_out: records.RecordSet | None
    fresh: tuple[str, ...] = ()

    def remember(self, directory: RunDirectory) -> None:
        """Keeps what the checks found, so that the next start need not repeat them."""
        for name in self.fresh:
            record_set = self.train if name == "input_files" else self.held_out
            with writing(_cache(directory, name)):
                records.write_cache(_cache(directory, name), record_set, self.record_format)


def _cache(directory: RunDirectory, name: str) -> str:
    return directory.join(f".checked_{name}.json")


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where the data of a run stands.

    Attributes:
      input_files: training records; empty for `--mode=eval`.
      eval_files: held-out records; empty for `--mode=train`.
      vocab_file: the vocabulary.
    """

    input_files: Sequence[str]
    eval_files: Sequence[str]
    vocab_file: str


def given_files(config: Config) -> DataFiles:
    """Finds the files that the flags name.

    Raises:
      InputError: a pattern matches nothing.
    """
    train = config.input_files if config.mode != "eval" else ""
    held_out = config.eval_files if config.mode != "train" else ""
    return DataFiles(
        files.find_files(train, "--input_files") if train else [],
        files.find_files(held_out, "--eval_files") if held_out else [],
        config.vocab_file,
    )


def read_data(found: DataFiles, config: Config, bert: BertConfig, directory: RunDirectory) -> Data:
    """Reads the vocabulary and checks every record, or finds that they were checked before.

    Raises:
      InputError: names the flag, the file and the record that does not fit.
    """
    words = vocabulary.read_vocabulary(found.vocab_file)
    if bert.vocab_size and bert.vocab_size < len(words):
        raise InputError(
            f"--bert_config_file={config.bert_config_file}: expected a vocab_size of at least the "
            f"{len(words)} tokens of --vocab_file={found.vocab_file}. Received: {bert.vocab_size}"
        )
    record_format = RecordFormat(
        max_seq_length=config.max_seq_length,
        max_predictions_per_seq=config.max_predictions_per_seq,
        vocab_size=len(words),
        type_vocab_size=bert.type_vocab_size,
    )
    checked, fresh = {}, []
    for name in ("input_files", "eval_files"):
        paths = getattr(found, name)
        if not paths:
            continue
        checked[name] = records.read_cache(_cache(directory, name), paths, record_format)
        if checked[name] is None:
            size = sum(tf.io.gfile.stat(path).length for path in paths)
            with console.progress(f"Checking --{name}", size, "B", scale=True) as bar:
                checked[name] = check_records(paths, record_format, f"--{name}", bar.update)
            fresh.append(name)
    return Data(
        words=words,
        record_format=record_format,
        train=checked.get("input_files"),
        held_out=checked.get("eval_files"),
        fresh=tuple(fresh),
    )
