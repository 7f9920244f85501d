"""What the worker processes of make_data do: blocks, and then shards."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from pretraining import block_files, corpus, shards
from pretraining.block_files import Making
from pretraining.errors import InputError
from pretraining.files import why
from pretraining.scratch_folder import ScratchFolder
from pretraining.worker_pool import GO_ON


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What all tasks of a stage share.

    Attributes:
      making: what examples are made with.
      masking: "static" or "dynamic".
      scratch: where blocks are kept.
      output_dir: where shards are written, local or gs://.
      examples: the files of examples that shards are made of.
    """

    making: Making
    masking: str
    scratch: ScratchFolder
    output_dir: str
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Borrowing:
    """A block that borrows documents.

    Attributes:
      block: its index.
      lenders: blocks that lend to it.
    """

    block: int
    lenders: tuple[int, ...]


def work(job: Job, task: corpus.Block | Borrowing | shards.Shard) -> dict[str, Any]:
    """Does a task in a worker process; returns the facts that the parent needs."""
    _one_thread()
    with writing(job):
        if isinstance(task, corpus.Block):
            return block_files.make_block(job.making, task, job.scratch.block(task.index))
        if isinstance(task, Borrowing):
            return block_files.finish_block(
                job.making,
                task.block,
                job.scratch.block(task.block),
                [job.scratch.block(lender) for lender in task.lenders],
                job.scratch.finished_block(task.block),
            )
        return _make_shard(job, task)


@contextlib.contextmanager
def writing(job: Job) -> Iterator[None]:
    """Turns a failure to write, a full disk above all, into one line."""
    try:
        yield
    except OSError as error:
        path = error.filename or job.scratch.path
        raise InputError(
            f"--output_dir={job.output_dir}: {path} cannot be written ({error.strerror or error}). "
            f"{GO_ON}"
        ) from None
    except tf.errors.OpError as error:
        raise InputError(
            f"--output_dir={job.output_dir}: {why(error, job.output_dir, 'written')}. {GO_ON}"
        ) from None


def _make_shard(job: Job, shard: shards.Shard) -> dict[str, Any]:
    unfinished = f"{job.output_dir}/.{shard.name}.unfinished"
    facts = _writer(job).write(shard, job.examples, unfinished)
    path = f"{job.output_dir}/{shard.name}"
    shards.finish(facts, unfinished, path, job.scratch.note(shard.name))
    return facts


@functools.lru_cache(maxsize=1)
def _writer(job: Job) -> shards.ShardWriter:
    return shards.ShardWriter(job.making, job.masking)


@functools.cache
def _one_thread() -> None:
    # A worker a core; several threads in each would only get in each other's way.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
