"""`python -m pretraining.make_data`: text to TFRecords of BERT examples, in parallel.

Two stages: blocks of text are tokenised and cut into examples; then shards are made of the examples,
in random order. Whatever is finished is kept, so the program can be stopped at any moment and
repeated; what it writes depends on the input, the vocabulary, the settings and the seed alone.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from pretraining import program
from pretraining.errors import InputError
from pretraining.flags import check_limits, flag
from pretraining.text_formats import FORMATS, INPUT_FORMAT_HELP, INPUT_HELP

MASKING = ("static", "dynamic")
# Flags that change nothing in what is written.
FREE = ("input", "vocab_file", "output_dir", "workers", "work_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The flags of `python -m pretraining.make_data`, in the order in which `--help` lists them."""

    input: str = flag("", INPUT_HELP)
    input_format: str = flag("auto", INPUT_FORMAT_HELP, choices=FORMATS)
    vocab_file: str = flag("", "WordPiece vocabulary, a token a line, local or gs://")
    output_dir: str = flag("", "folder for *.tfrecord and manifest.json, local or gs://")
    max_seq_length: int = flag(128, "tokens in an example", at_least=8, at_most=65535)
    max_predictions_per_seq: int = flag(20, "masked tokens in an example at most", at_least=1)
    masked_lm_prob: float = flag(0.15, "part of the tokens to predict", above=0.0, at_most=1.0)
    short_seq_prob: float = flag(
        0.1,
        "part of the documents cut into shorter examples of a random length",
        at_least=0.0,
        at_most=1.0,
    )
    dupe_factor: int = flag(
        10,
        "how often each document is used, with other cuts and masks each time",
        at_least=1,
        at_most=200,
    )
    do_lower_case: bool = flag(True, "lower-case the text and strip its accents")
    do_whole_word_mask: bool = flag(False, "mask all pieces of a word or none")
    masking: str = flag(
        "static",
        "static: masks are in the records. dynamic: the records hold the text alone, and training "
        "masks it anew in each epoch; then --dupe_factor=1 does",
        choices=MASKING,
    )
    random_seed: int = flag(12345, "source of every choice", at_least=0, below=2**32)
    num_shards: int = flag(
        0, "number of files, 0 for files of about 50 MB", at_least=0, at_most=99999
    )
    block_bytes: int = flag(
        0, "text in a unit of work, 0 for some MB; a random segment is from its block", at_least=0
    )
    workers: int = flag(0, "processes, 0 for all cores that this process may use", at_least=0)
    work_dir: str = flag(
        "",
        "local folder for unfinished work, a third of the size of the output; by default in the "
        "output folder, for one on gs:// in the system's temporary folder",
    )

    def __post_init__(self) -> None:
        check_limits(self)
        for name, expected in (
            ("input", "files, globs or folders"),
            ("vocab_file", "a file with a token a line"),
            ("output_dir", "a folder"),
        ):
            if not getattr(self, name):
                raise InputError(f"--{name}: expected {expected}. Received: nothing")
        if self.max_predictions_per_seq > self.max_seq_length:
            raise InputError(
                f"--max_predictions_per_seq={self.max_predictions_per_seq}: expected at most "
                f"--max_seq_length. Received: --max_seq_length={self.max_seq_length}"
            )
        if "://" in self.work_dir:
            raise InputError(f"--work_dir={self.work_dir}: expected a local folder")

    @property
    def settings(self) -> dict[str, str | int | float | bool]:
        """The flags that change what is written, by name."""
        return {n: v for n, v in dataclasses.asdict(self).items() if n not in FREE}


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status, 2 where something given cannot work."""
    return program.run(argv, "pretraining.make_data", DataConfig, _work)


def _work(config: DataConfig) -> None:
    from pretraining.scratch_folder import ScratchFolder, place

    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # nothing here is for an accelerator
    output_dir = config.output_dir.rstrip("/") or "/"
    scratch = ScratchFolder(place(output_dir, config.work_dir))
    if os.path.exists(f"{output_dir}/manifest.json") and not os.path.exists(scratch.path):
        from pretraining import data_plan  # no worker and no lock for a folder that is complete

        if data_plan.is_complete(config, output_dir):
            return
    from pretraining.worker_pool import WorkerPool

    workers = config.workers or len(os.sched_getaffinity(0))
    # The workers import TensorFlow while this process does.
    with (
        scratch.locked(output_dir) as lock,
        WorkerPool(workers, "pretraining.data_tasks:work", [lock]) as pool,
    ):
        from pretraining import data_stages

        data_stages.run(config, output_dir, scratch, pool)


if __name__ == "__main__":
    program.leave(main(sys.argv))
