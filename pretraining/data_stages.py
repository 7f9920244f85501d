"""The stages of make_data in the process that leads the workers."""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from pretraining import (
    array_files,
    block_files,
    console,
    corpus,
    data_plan,
    manifest,
    record_sets,
    shards,
)
from pretraining.data_tasks import Borrowing, Job, writing
from pretraining.errors import InputError
from pretraining.examples import ExampleSettings
from pretraining.make_data import DataConfig
from pretraining.scratch_folder import ScratchFolder
from pretraining.worker_pool import WorkerPool


def run(config: DataConfig, output_dir: str, scratch: ScratchFolder, pool: WorkerPool) -> None:
    """Makes the data, or what is missing of it."""
    inputs = data_plan.read_inputs(config)
    making = block_files.Making(
        vocabulary=inputs.words,
        do_lower_case=config.do_lower_case,
        settings=ExampleSettings(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(ExampleSettings)}
        ),
    )
    job = Job(making, config.masking, scratch, output_dir)
    with writing(job):
        if data_plan.is_complete(config, output_dir, inputs):
            if scratch.read("plan.json") is not None:
                scratch.remove()
            return
        data_plan.begin(inputs, output_dir, scratch)
        DataMaker(config, inputs, job, pool).run()


class DataMaker:
    """Makes blocks, then shards, then the manifest; leaves out what is there already."""

    def __init__(self, config: DataConfig, inputs: data_plan.Inputs, job: Job, pool: WorkerPool):
        self._config = config
        self._inputs = inputs
        self._job = job
        self._scratch = job.scratch
        self._pool = pool

    def run(self) -> None:
        """Does all stages and says what came of it."""
        formats = ", ".join(sorted({source.format for source in self._inputs.sources}))
        console.say(
            f"Text: {len(self._inputs.sources)} files, {self._inputs.size / 1e6:.1f} MB, {formats}. "
            f"{len(self._pool.pids)} workers"
        )
        started = time.monotonic()
        facts = self._make_blocks()
        files = self._finish_blocks(facts)
        cut = time.monotonic()
        done = self._make_shards(files)
        counts = record_sets.total(facts, done)
        manifest.write(
            self._job.output_dir,
            record_sets.describe(self._job.making, self._job.masking, done, counts)
            | self._inputs.plan,
        )
        self._scratch.remove()
        self._summarise(counts, len(done), cut - started, time.monotonic() - cut)

    def _make_blocks(self) -> list[dict[str, Any]]:
        known = self._scratch.read("blocks.json")
        if known is not None:
            return [array_files.read_facts(self._scratch.block(i)) for i in range(known)]
        facts: dict[int, dict[str, Any]] = {}
        with console.progress("Tokens and pairs", self._inputs.size, "B", scale=True) as bar:
            sizes: dict[str, int] = {}
            tasks = self._blocks(facts, sizes, bar)
            for name, result in self._pool.run(self._job, tasks):
                facts[int(name.split()[1])] = result
                bar.update(sizes.pop(name))
            bar.update(self._inputs.size - bar.n)
        self._scratch.write("blocks.json", len(facts))
        return [facts[i] for i in range(len(facts))]

    def _blocks(self, facts, sizes, bar) -> Iterator[tuple[str, corpus.Block]]:
        """Reads blocks and yields those that are not there yet."""
        read: list[int] = []
        size = self._config.block_bytes or data_plan.block_bytes(
            self._inputs.size, self._config.dupe_factor
        )
        for block in corpus.read_blocks(self._inputs.sources, size, read.append):
            path = self._scratch.block(block.index)
            if os.path.exists(path):
                facts[block.index] = array_files.read_facts(path)
                bar.initial += sum(read)
                bar.update(sum(read))
            else:
                name = f"block {block.index} (of {block.parts[0].source.path})"
                sizes[name] = sum(read)
                yield name, block
            read.clear()

    def _finish_blocks(self, facts: list[dict[str, Any]]) -> list[str]:
        """Makes the examples of blocks that borrow; returns the files of all examples."""
        try:
            record_sets.check_documents(facts, f"--input={self._config.input}")
        except InputError:
            self._scratch.remove()
            raise
        lenders = block_files.lenders(facts)
        found = self._scratch.finished_block
        tasks = (
            (f"block {block}, which borrows documents", Borrowing(block, tuple(lenders[block])))
            for block in lenders
            if not os.path.exists(found(block))
        )
        for _ in self._pool.run(self._job, tasks):
            pass
        files = [self._scratch.block(i) for i, block in enumerate(facts) if "examples" in block]
        return files + [found(block) for block in lenders]

    def _make_shards(self, files: list[str]) -> list[dict[str, Any]]:
        examples = sum(array_files.read_facts(path)["examples"] for path in files)
        planned = self._plan_shards(files, examples)
        done = [self._finished(shard) for shard in planned]
        job = dataclasses.replace(self._job, examples=tuple(files))
        missing = {s.name: s for s, facts in zip(planned, done, strict=True) if facts is None}
        before = examples - sum(shard.records for shard in missing.values())
        found = {facts["name"]: facts for facts in done if facts}
        with console.progress("Records", examples, " examples", before, scale=True) as bar:
            for name, facts in self._pool.run(job, missing.items()):
                found[name] = facts
                bar.update(facts["records"])
        return [found[shard.name] for shard in planned]

    def _plan_shards(self, files: list[str], examples: int) -> list[shards.Shard]:
        known = self._scratch.read("shards.json")
        if known is None:
            count = self._config.num_shards or data_plan.num_shards(
                self._inputs.size, examples, self._config
            )
            if count > examples:
                self._scratch.remove()
                raise InputError(
                    f"--num_shards={count}: expected at most the number of examples. "
                    f"Received: a text that makes {examples}"
                )
            known = [dataclasses.astuple(shard) for shard in shards.plan(files, count)]
            self._scratch.write("shards.json", known)
        return [shards.Shard(*values) for values in known]

    def _finished(self, shard: shards.Shard) -> dict[str, Any] | None:
        facts = self._scratch.read(f"{shard.name}.json")
        path = f"{self._job.output_dir}/{shard.name}"
        if facts is None or not tf.io.gfile.exists(path):
            return None
        return facts if tf.io.gfile.stat(path).length == facts["bytes"] else None

    def _summarise(self, counts: Counter, num: int, cutting: float, writing: float) -> None:
        speed = self._inputs.size / 1e6 / (cutting + writing)
        say = console.say
        say(
            f"{counts['documents']} documents, {counts['sentences']} sentences, {counts['tokens']} "
            f"tokens, {100 * counts['unknown_tokens'] / counts['tokens']:.2f}% of them [UNK]"
        )
        if counts["bad_bytes"]:
            say(f"{counts['bad_bytes']} places were no UTF-8 and were replaced by U+FFFD")
        say(
            f"{counts['examples']} examples of {counts['example_tokens'] / counts['examples']:.1f} "
            f"tokens, {100 * counts['random_next'] / counts['examples']:.1f}% with a random B"
        )
        say(
            f"{self._job.output_dir}/manifest.json: {num} shards. {cutting:.1f} s for tokens and "
            f"pairs, {writing:.1f} s for records, {speed:.2f} MB/s of text"
        )
