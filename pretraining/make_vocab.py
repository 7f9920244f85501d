"""`python -m pretraining.make_vocab`: learns a WordPiece vocabulary in BERT's format from text."""

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence

from pretraining import program
from pretraining.errors import InputError
from pretraining.flags import check_limits, flag
from pretraining.text_formats import FORMATS, INPUT_FORMAT_HELP, INPUT_HELP

BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabConfig:
    """The flags of `python -m pretraining.make_vocab`, in the order in which `--help` lists them."""

    input: str = flag("", INPUT_HELP)
    output: str = flag("", "the vocabulary to write, local or gs://: a token a line")
    vocab_size: int = flag(
        30522,
        "tokens in the vocabulary. It has exactly that many if the text does. Of its characters the "
        "1000 most frequent are kept, or so many that they take three quarters of the vocabulary",
        at_least=100,
        at_most=1_000_000,
    )
    do_lower_case: bool = flag(True, "lower-case the text and strip its accents")
    input_format: str = flag("auto", INPUT_FORMAT_HELP, choices=FORMATS)
    overwrite: bool = flag(False, "replace the file at --output if there is one")

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.input:
            raise InputError("--input: expected files, globs or folders. Received: nothing")
        if not self.output or self.output.endswith("/"):
            received = self.output or "nothing"
            raise InputError(f"--output: expected the name of a file. Received: {received}")


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status, 2 where something given cannot work."""
    return program.run(argv, "pretraining.make_vocab", VocabConfig, _work)


def _work(config: VocabConfig) -> None:
    from pretraining import console, corpus, vocabulary, vocabulary_learning

    started = time.monotonic()
    vocabulary.check_new_file(config.output, "--output", config.overwrite)
    found = corpus.find_sources(config.input, config.input_format)
    # A vocabulary that an earlier run wrote among the text is no text.
    sources = [source for source in found if source.path != config.output] or found
    size = sum(source.size for source in sources)
    formats = ", ".join(sorted({source.format for source in sources}))
    console.say(f"Text: {len(sources)} files, {size / 1e6:.1f} MB ({formats})")
    tally: Counter[str] = Counter()
    with console.progress("Counting words", size, "B", scale=True) as bar:
        blocks = corpus.read_blocks(sources, BLOCK_BYTES, bar.update)
        counts = vocabulary_learning.count_blocks(blocks, config.do_lower_case, tally)
    console.say(
        f"Words: {tally['words']} in {tally['documents']} documents, {len(counts)} distinct ones"
    )
    if tally["forgotten"]:
        console.say(f"Forgotten to save memory: rare words, {tally['forgotten']} in all")
    if tally["bad_bytes"]:
        console.say(f"Not UTF-8, and replaced by U+FFFD: {tally['bad_bytes']} places in the text")
    with console.timed("Vocabulary, learnt"):
        words = vocabulary_learning.learn_vocabulary(counts, config.vocab_size)
    vocabulary.write_vocabulary(words, config.output, "--output")
    if len(words) < config.vocab_size:
        console.say(
            f"Fewer tokens than --vocab_size={config.vocab_size}: the text does not hold that many "
            "pieces of words"
        )
    tokens, unknown = vocabulary_learning.measure(words, counts, config.do_lower_case)
    console.say(
        f"{config.output}: {len(words)} tokens. In this text a word is {tokens:.3f} tokens, and "
        f"{100 * unknown:.3f}% of the words are [UNK]. {time.monotonic() - started:.1f} s in all"
    )


if __name__ == "__main__":
    program.leave(main(sys.argv))
