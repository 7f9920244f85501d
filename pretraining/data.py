"""The vocabulary and the checked records of a run."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import tensorflow as tf

from pretraining import console, files, input_pipeline, manifest, records, vocabulary
from pretraining.batch_plan import BatchPlan
from pretraining.config import Config
from pretraining.errors import InputError
from pretraining.model import BertConfig
from pretraining.phases import Phase
from pretraining.record_checks import RecordCheck
from pretraining.record_format import RecordFormat
from pretraining.run_directory import RunDirectory, writing

EVAL_MASKING_SEED = 0  # the same masks for every run
Input = Callable[[tf.distribute.InputContext], tf.data.Dataset]
LENGTH = "{max_seq_length}"  # in a path, stands for that of the phase
SHOWN = 20  # skipped records named in the log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The checked records of a run.

    Attributes:
      words: the vocabulary.
      record_format: what every record holds.
      train: the training records, None for `--mode=eval`.
      held_out: the held-out records, None for `--mode=train`.
      fresh: the names of the flags whose records were checked just now.
      phase: the phase that they are for, counted from 1.
    """

    words: vocabulary.Vocabulary
    record_format: RecordFormat
    train: records.RecordSet | None
    held_out: records.RecordSet | None
    fresh: tuple[str, ...] = ()
    phase: int = 1

    def train_input(self, plan: BatchPlan, seed: int, step: int) -> Input:
        """Returns the function that makes each host's batches from a step on."""
        return functools.partial(
            input_pipeline.train_dataset,
            self.train,
            self.record_format,
            plan,
            seed,
            step,
            masking=self._masking(self.train, seed),
        )

    def eval_input(self, plan: BatchPlan) -> Input:
        """Returns the function that makes each host's batches of the held-out records."""
        return functools.partial(
            input_pipeline.eval_dataset,
            self.held_out,
            self.record_format,
            plan,
            masking=self._masking(self.held_out, EVAL_MASKING_SEED),
        )

    def _masking(self, record_set: records.RecordSet, seed: int) -> input_pipeline.Masking | None:
        if record_set.masking is None:
            return None
        places = self.record_format.max_predictions_per_seq
        return input_pipeline.dynamic_masking(record_set.masking, self.words, places, seed)

    def train_fault(
        self, error: tf.errors.OpError, plan: BatchPlan, seed: int, step: int
    ) -> InputError:
        """Finds out which record made the input of a step fail; TensorFlow names no file."""
        paths = input_pipeline.shards_in_use(self.train, plan, seed, step)
        return self._fault(error, "--input_files", self.train, paths)

    def eval_fault(self, error: tf.errors.OpError) -> InputError:
        """Finds out which held-out record made the evaluation fail."""
        paths = [shard.path for shard in self.held_out.shards]
        return self._fault(error, "--eval_files", self.held_out, paths)

    def _fault(
        self,
        error: tf.errors.OpError,
        flag: str,
        known: records.RecordSet,
        paths: Sequence[str],
    ) -> InputError:
        console.say(f"{flag}: a record could not be used; looking for it")
        try:
            for path in paths:
                RecordCheck(record_format=self.record_format, flag=flag, known=known).run([path])
        except InputError as found:
            return InputError(
                f"{found}. --skip_corrupt_records goes on without such records; what was saved before "
                "is intact"
            )
        return InputError(
            f"{flag}: the input failed ({_cause(error)}), and every record reads well now"
        )

    def remember(self, directory: RunDirectory) -> None:
        """Keeps what the checks found, so that the next start need not repeat them."""
        for name in self.fresh:
            record_set = self.train if name == "input_files" else self.held_out
            path = _cache(directory, name, self.phase)
            with writing(path):
                records.write_cache(path, record_set, self.record_format)


def _cause(error: tf.errors.OpError) -> str:
    """What TensorFlow says behind the Python stack that it prints first."""
    lines = [line.strip() for line in str(error.message).splitlines()]
    stack = max((i for i, line in enumerate(lines) if line.startswith("File ")), default=-1)
    return " ".join(line for line in lines[stack + 1 :] if line and line[0] != "[")[:300]


def _cache(directory: RunDirectory, name: str, phase: int) -> str:
    return directory.join(f".checked_{name}{f'_{phase}' if phase > 1 else ''}.json")


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


def given_files(config: Config, phase: Phase) -> DataFiles:
    """Finds the files that the flags name for a phase.

    Raises:
      InputError: a pattern matches nothing.
    """

    def of_phase(patterns: str) -> str:
        return patterns.replace(LENGTH, str(phase.max_seq_length))

    train = config.input_files if config.mode != "eval" else ""
    held_out = config.eval_files if config.mode != "train" else ""
    return DataFiles(
        _find(of_phase(train), "--input_files"),
        _find(of_phase(held_out), "--eval_files"),
        config.vocab_file,
    )


def _find(patterns: str, flag: str) -> list[str]:
    if not patterns:
        return []
    found = files.find_files(patterns, flag)
    manifest.missing_files(patterns, found, flag)
    return found


def read_data(
    found: DataFiles, config: Config, phase: Phase, bert: BertConfig, directory: RunDirectory
) -> Data:
    """Reads the vocabulary and checks the records of a phase, or finds that they were checked before.

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
        max_seq_length=phase.max_seq_length,
        max_predictions_per_seq=phase.max_predictions_per_seq,
        vocab_size=len(words),
        type_vocab_size=bert.type_vocab_size,
    )
    checked, fresh = {}, []
    for name in ("input_files", "eval_files"):
        paths = getattr(found, name)
        if paths:
            reader = _Reader(f"--{name}", paths, record_format, config.skip_corrupt_records)
            checked[name], new = reader.read(words, _cache(directory, name, phase.number))
            fresh += [name] * new
    return Data(
        words=words,
        record_format=record_format,
        train=checked.get("input_files"),
        held_out=checked.get("eval_files"),
        fresh=tuple(fresh),
        phase=phase.number,
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Finds out what a flag's records are, by reading as little of them as will do."""

    flag: str
    paths: Sequence[str]
    record_format: RecordFormat
    skip_corrupt_records: bool

    def read(self, words: vocabulary.Vocabulary, cache: str) -> tuple[records.RecordSet, bool]:
        """Returns the records and whether they were all read just now."""
        manifests = manifest.manifests_of(self.paths, self.flag)
        known = None
        if manifests is not None:
            for each in manifests:
                each.check(self.record_format, words, self.flag)
            known = manifest.record_set(self.paths, manifests, len(words), self.flag)
            if not self.skip_corrupt_records:
                self._check_sizes(known)
                return known, False
        found = records.read_cache(cache, self.paths, self.record_format)
        usable = found is not None and (self.skip_corrupt_records or not found.corrupt_records)
        if found is None or not usable:
            return self._check(known), True
        if found.corrupt_records:
            _say_corrupt(self.flag, found)
        return found, False

    def _check_sizes(self, known: records.RecordSet) -> None:
        for shard in known.shards:
            if records.stamp(shard.path)[0] != shard.size:
                # Reading it names the record; one that reads well is another file.
                RecordCheck(record_format=self.record_format, flag=self.flag, known=known).run(
                    [shard.path]
                )
                raise InputError(
                    f"{self.flag}={shard.path}: expected {shard.size} bytes, as the manifest.json "
                    f"beside it says. Received: {records.stamp(shard.path)[0]}"
                )

    def _check(self, known: records.RecordSet | None) -> records.RecordSet:
        corrupt: list[str] = []
        size = sum(records.stamp(path)[0] for path in self.paths)
        with console.progress(f"Checking {self.flag}", size, "B", scale=True) as bar:
            found = RecordCheck(
                record_format=self.record_format,
                flag=self.flag,
                known=known,
                on_corrupt=corrupt.append if self.skip_corrupt_records else None,
                on_progress=bar.update,
            ).run(self.paths)
        for line in corrupt[:SHOWN]:
            console.say(f"Skipped: {line}")
        if corrupt:
            _say_corrupt(self.flag, found)
        return found


def _say_corrupt(flag: str, found: records.RecordSet) -> None:
    console.say(
        f"{flag}: {found.corrupt_records} of {found.num_records} records cannot be used; the next good "
        "one of its window stands in for each"
    )
