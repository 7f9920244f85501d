"""Statistics over examples: lengths, masks, pairs."""

import itertools

import numpy as np

from pretraining.vocabulary import Vocabulary

BARS = 8
BAR_WIDTH = 40


class RecordStatistics:
    """Sums over the examples of a set of records.

    Attributes:
      examples: (where it stands, its features) of the first examples.
      faults: what cannot be meant, a line each: predictions at places without a token.
    """

    def __init__(self, words: Vocabulary, keep: int):
        self._words = words
        self._keep = keep
        self.examples: list[tuple[str, dict[str, np.ndarray]]] = []
        self.faults: list[str] = []
        self._lengths = np.zeros(1, np.int64)
        self._predictions = np.zeros(1, np.int64)
        self._kinds = {"[MASK]": 0, "unchanged": 0, "replaced": 0}
        self._unknown = self._random_pairs = 0

    def add(self, path: str, numbers: np.ndarray, features: dict[str, np.ndarray]) -> None:
        """Takes the decoded features [rows, ...] of records of one file, and their numbers."""
        ids, used = features["input_word_ids"], features["input_mask"].sum(axis=1)
        for row in range(min(self._keep - len(self.examples), len(ids))):
            example = {name: values[row] for name, values in features.items()}
            self.examples.append((f"{path}: record {numbers[row]}", example))
        self._lengths = _add_counts(self._lengths, used)
        self._unknown += int((ids == self._words.ids["[UNK]"]).sum())
        self._random_pairs += int(features["next_sentence_labels"].sum())
        if "masked_lm_ids" in features:
            self._add_masks(path, numbers, features, ids)

    def _add_masks(
        self, path: str, numbers: np.ndarray, features: dict[str, np.ndarray], ids: np.ndarray
    ) -> None:
        positions, labels = features["masked_lm_positions"], features["masked_lm_ids"]
        real = features["masked_lm_weights"] > 0
        self._predictions = _add_counts(self._predictions, real.sum(axis=1))
        seen = np.take_along_axis(ids, positions, axis=1)
        masked, same = seen == self._words.ids["[MASK]"], seen == labels
        self._kinds["[MASK]"] += int((real & masked).sum())
        self._kinds["unchanged"] += int((real & same & ~masked).sum())
        self._kinds["replaced"] += int((real & ~same & ~masked).sum())
        empty = real & (np.take_along_axis(features["input_mask"], positions, axis=1) == 0)
        for row in np.flatnonzero(empty.any(axis=1)):
            self.faults.append(
                f"--input_files={path}: record {numbers[row]}: expected masked_lm_positions of tokens. "
                f"Received: {positions[row][empty[row]][0]}, which is padding"
            )

    def lines(self) -> list[str]:
        """Returns the statistics, a line each."""
        count = int(self._lengths.sum())
        if not count:
            return ["No record could be decoded."]
        tokens = int(self._lengths @ np.arange(len(self._lengths)))
        result = [
            f"Tokens in an example, [CLS] and [SEP] counted: mean {tokens / count:.1f}, "
            f"{_span(self._lengths)}",
            *_bars(self._lengths),
            f"Unknown tokens, [UNK]: {self._unknown / tokens:.3%}",
            f"Second segments of another document: {self._random_pairs / count:.2%}",
        ]
        predicted = int(self._predictions @ np.arange(len(self._predictions)))
        if predicted:
            shares = ", ".join(f"{kind} {n / predicted:.2%}" for kind, n in self._kinds.items())
            result += [
                f"Tokens to predict: {predicted / tokens:.2%} of all, mean {predicted / count:.2f} an "
                f"example, {_span(self._predictions)}",
                f"What stands in their places: {shares}",
            ]
        return result


def _add_counts(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    more = np.bincount(values, minlength=len(counts))
    more[: len(counts)] += counts
    return more


def _span(counts: np.ndarray) -> str:
    present = np.flatnonzero(counts)
    return f"least {present[0]}, most {present[-1]}"


def _bars(counts: np.ndarray) -> list[str]:
    """A histogram in text."""
    edges = np.unique(np.linspace(0, len(counts), BARS + 1).astype(int))
    sums = [int(counts[a:b].sum()) for a, b in itertools.pairwise(edges)]
    return [
        f"  {a:4d} to {b - 1:4d} |{'#' * round(BAR_WIDTH * n / max(sums)):{BAR_WIDTH}}| {n}"
        for (a, b), n in zip(itertools.pairwise(edges), sums, strict=True)
    ]
