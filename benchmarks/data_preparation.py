"""Text to records and text to vocabulary, beside tf-models' script and tensorflow-text's learner.

    python benchmarks/data_preparation.py --rounds=3

The text is prose found in the Python installation (or --text=FILE, a sentence a line, a blank line
between documents), the same for both sides. Vocabularies are learnt in this process, imports not
counted. Each program that makes records is a process of its own, on one core; what counts is the CPU
time of all its processes per byte *past its start*: the time on a text less that on a hundredth of it. The faster program gets the text several times over, for a figure that is not
lost in the noise of the imports. Rounds take turns. Writes a CSV and prints a table.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # measures this checkout

import tensorflow as tf
from tensorflow_text.tools.wordpiece_vocab import bert_vocab_from_dataset

from benchmarks import report
from benchmarks.report import progress
from pretraining import corpus, found_text, make_vocab, vocabulary, vocabulary_learning
from pretraining.sentence_splitting import split_sentences

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("tensorflow", "tensorflow-text", "tf-models-official", "sentencepiece")
COLUMNS = (
    "task contender mb_per_cpu_sec seconds tokens_per_word unknown_rate rounds text_bytes settings "
    "tensorflow tensorflow-text tf-models-official sentencepiece lamb_tf machine command date"
).split()
SETTINGS = {
    "max_seq_length": 128,
    "max_predictions_per_seq": 20,
    "masked_lm_prob": 0.15,
    "short_seq_prob": 0.1,
    "dupe_factor": 1,
    "random_seed": 12345,
}
OURS, SCRIPT = "lamb_tf make_data --workers=1", "tf-models create_pretraining_data"
LEARNER, OUR_LEARNER = "tensorflow-text bert_vocab_from_dataset", "lamb_tf make_vocab"
SMALL = 100  # the start of a program is measured on this part of the text


def find_text(size: int) -> list[list[str]]:
    """Returns documents of sentences, about `size` bytes in all."""
    found = [paragraphs for _, paragraphs in found_text.find_documents(size)]
    sentences = iter(split_sentences(p for document in found for p in document))
    return [[s for _ in document for s in next(sentences)] for document in found]


def write_text(documents: list[list[str]], path: pathlib.Path, times: int = 1) -> int:
    """Writes a sentence a line and a blank line between documents; returns the size in bytes."""
    text = "\n\n".join("\n".join(document) for document in documents) + "\n\n"
    path.write_text(text * times)
    return path.stat().st_size


def cpu_seconds(command: list[str]) -> float:
    """Runs a command on one core; returns the CPU time of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    core = min(os.sched_getaffinity(0))
    result = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(text: pathlib.Path, vocab: pathlib.Path, folder: pathlib.Path) -> dict[str, list[str]]:
    """Returns how each program turns a text into records."""
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    ours = [f"--input={text}", f"--vocab_file={vocab}", f"--output_dir={folder / 'ours'}"]
    theirs = [f"--input_file={text}", f"--vocab_file={vocab}", f"--output_file={folder / 'theirs'}"]
    return {
        OURS: [sys.executable, "-m", "pretraining.make_data", *ours, *flags, "--workers=1"],
        SCRIPT: [
            *(sys.executable, "-m", "official.nlp.data.create_pretraining_data"),
            *(*theirs, *flags, "--do_lower_case"),
        ],
    }


def measure_records(
    documents: list[list[str]], vocab: pathlib.Path, folder: pathlib.Path, rounds: int, times: int
) -> list[dict]:
    """Returns a row for each program that makes records."""
    repeat = {OURS: times, SCRIPT: 1}
    rates: dict[str, list[float]] = {name: [] for name in repeat}
    sizes = {}
    for number in range(rounds):
        for name, count in repeat.items():
            seconds, bytes_read = [], []
            for part in (documents, documents[: max(2, len(documents) // SMALL)]):
                text = folder / "text.txt"
                bytes_read.append(write_text(part, text, count if part is documents else 1))
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    seconds.append(cpu_seconds(commands(text, vocab, pathlib.Path(out))[name]))
            sizes[name] = bytes_read[0]
            rates[name].append((bytes_read[0] - bytes_read[1]) / 1e6 / (seconds[0] - seconds[1]))
        progress(f"records: round {number + 1} of {rounds}")
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    return [
        {
            "task": "records",
            "contender": name,
            "mb_per_cpu_sec": round(statistics.median(values), 3),
            "rounds": rounds,
            "text_bytes": sizes[name],
            "settings": f"{settings}, lower case, static masks of single tokens",
        }
        for name, values in rates.items()
    ]


def quality(words: vocabulary.Vocabulary, lines: list[str]) -> tuple[float, float]:
    """Returns tokens a word and the part of the words that is unknown, of lines not learnt from."""
    words_in_all = sum(len(line.split()) for line in lines)
    ids, _ = words.tokenize_flat(lines)
    return len(ids) / words_in_all, float((ids == words.ids["[UNK]"]).sum()) / words_in_all


def measure_learners(
    documents: list[list[str]], folder: pathlib.Path, size: int, rounds: int
) -> list[dict]:
    """Returns a row for each learner; the last tenth of the text is kept to judge them by."""
    cut = len(documents) * 9 // 10
    text = folder / "learn.txt"
    text_bytes = write_text(documents[:cut], text)
    held_out = [sentence for document in documents[cut:] for sentence in document]
    lines = [sentence for document in documents[:cut] for sentence in document]

    def ours() -> vocabulary.Vocabulary:
        sources = corpus.find_sources(str(text), "auto")
        blocks = corpus.read_blocks(sources, make_vocab.BLOCK_BYTES, lambda size: None)
        counts = vocabulary_learning.count_blocks(blocks, True, collections.Counter())
        words = vocabulary_learning.learn_vocabulary(counts, size)
        (folder / "vocab.txt").unlink(missing_ok=True)
        vocabulary.write_vocabulary(words, str(folder / "vocab.txt"))
        return words

    def theirs() -> vocabulary.Vocabulary:
        tokens = bert_vocab_from_dataset.bert_vocab_from_dataset(
            tf.data.Dataset.from_tensor_slices(lines).batch(1000),
            vocab_size=size,
            reserved_tokens=list(vocabulary.SPECIAL_TOKENS),
            bert_tokenizer_params={"lower_case": True},
        )
        return vocabulary.Vocabulary(tuple(tokens))

    learners = {OUR_LEARNER: ours, LEARNER: theirs}
    times: dict[str, list[float]] = {name: [] for name in learners}
    learnt = {}
    for number in range(rounds):
        for name, learn in learners.items():
            start = time.perf_counter()
            learnt[name] = learn()
            times[name].append(time.perf_counter() - start)
        progress(f"vocabulary: round {number + 1} of {rounds}")
    rows = []
    for name, seconds in times.items():
        per_word, unknown = quality(learnt[name], held_out)
        rows.append(
            {
                "task": "vocabulary",
                "contender": name,
                "seconds": round(statistics.median(seconds), 2),
                "tokens_per_word": round(per_word, 4),
                "unknown_rate": round(unknown, 6),
                "rounds": rounds,
                "text_bytes": text_bytes,
                "settings": f"vocab_size={size}, {len(learnt[name])} tokens learnt, lower case, imports "
                "not counted",
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learner_rounds", type=int, default=1)
    parser.add_argument("--text", type=pathlib.Path, help="default: found in this installation")
    parser.add_argument("--text_bytes", type=int, default=3_000_000)
    parser.add_argument("--times", type=int, default=10, help="the text over for make_data")
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/...")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    arguments = parse_arguments()
    if arguments.text:
        blocks = arguments.text.read_text().split("\n\n")
        documents = [block.split("\n") for block in blocks if block.strip()]
    else:
        documents = find_text(arguments.text_bytes)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = measure_learners(documents, folder, arguments.vocab_size, arguments.learner_rounds)
        rows += measure_records(
            documents, folder / "vocab.txt", folder, arguments.rounds, arguments.times
        )
    facts = report.facts(PACKAGES)
    for row in rows:
        row.update(facts)
    for row in rows:
        if row["task"] == "records":
            print(f"{row['contender']:40}{row['mb_per_cpu_sec']:8.3f} MB a CPU second")
        else:
            print(
                f"{row['contender']:40}{row['seconds']:8.2f} s, {row['tokens_per_word']:.4f} tokens a "
                f"word, {row['unknown_rate']:.4%} unknown"
            )
    rate = {row["contender"]: row["mb_per_cpu_sec"] for row in rows if row["task"] == "records"}
    took = {row["contender"]: row["seconds"] for row in rows if row["task"] == "vocabulary"}
    print(f"vocabulary: {took[LEARNER] / took[OUR_LEARNER]:.1f} times as fast as the peer")
    print(f"records: {rate[OURS] / rate[SCRIPT]:.1f} times the peer's throughput of a core")
    report.write_csv(arguments.output or report.default_path("data_preparation"), rows, COLUMNS)


if __name__ == "__main__":
    main()
