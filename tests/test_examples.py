"""How documents are cut into pairs: exact where it is determined, by its distribution where not.

Most tests number the tokens of all documents, so that an example tells where it was cut out.
"""

import collections
import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from pretraining import examples, record_rows, tokenized_documents, vocabulary
from tests.conftest import WORDS, made_up_documents

VOCABULARY = vocabulary.Vocabulary((*vocabulary.SPECIAL_TOKENS, *WORDS))
PAD, CLS, SEP, MASK = (VOCABULARY.ids[t] for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
SETTINGS = examples.ExampleSettings(max_seq_length=48, max_predictions_per_seq=7, dupe_factor=3)
SPECIAL = (-1, -2)  # [CLS] and [SEP] where tokens are numbers


@dataclasses.dataclass
class Pair:
    """An example whose tokens are their places in the corpus."""

    a: np.ndarray
    b: np.ndarray
    is_random: bool


def numbered(lengths):
    """Documents of which the tokens are 0, 1, 2, ...; `lengths` holds those of the sentences."""
    sentences = np.array([length for document in lengths for length in document], np.int64)
    return tokenized_documents.arrange(
        np.arange(sentences.sum(), dtype=np.int32),
        sentences,
        np.array([len(document) for document in lengths]),
        range(len(lengths)),
    )


def pairs_of(documents, settings, **options):
    built = examples.build(documents, settings, *SPECIAL, **options)
    assert (np.diff(built.keys.astype(object)) > 0).all(), "the keys ascend"
    found = []
    ends = built.starts + built.lengths
    for start, end, a, is_random in zip(
        built.starts, ends, built.a_lengths, built.is_random, strict=True
    ):
        tokens = built.tokens[start:end]
        assert tokens[0] == SPECIAL[0] and tokens[a + 1] == tokens[-1] == SPECIAL[1]
        pair = Pair(tokens[1 : a + 1], tokens[a + 2 : -1], bool(is_random))
        for segment in (pair.a, pair.b):
            assert len(segment) >= 1
            assert (np.diff(segment) == 1).all(), "a segment is a piece of the corpus"
        found.append(pair)
    return found


def owner(documents, token):
    """The document that a token is from."""
    ends = documents.sentences[documents.firsts[1:]]
    return int(np.searchsorted(ends, token, side="right"))


def even(counts, expected):
    """Whether counts fluctuate about what is expected as chance does: chi-squared, 5 sigma."""
    counts, freedom = np.asarray(counts, float), len(counts) - 1
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    return abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def settings(length, **options):
    options = {"short_seq_prob": 0.0, "random_seed": 3, **options}
    return examples.ExampleSettings(max_seq_length=length, **options)


def test_chunks_follow_each_other_and_lose_nothing():
    """Sentences of a token: nothing is truncated, so every pair can be told exactly."""
    documents = numbered([[1] * n for n in np.random.default_rng(0).integers(1, 60, 200)])
    found = sorted(pairs_of(documents, settings(13)), key=lambda pair: pair.a[0])
    expected = 0
    for pair in found:
        assert pair.a[0] == expected, "A begins where the pair before it ended"
        own, other = owner(documents, pair.a[0]), owner(documents, pair.b[0])
        last = documents.sentences[documents.firsts[own + 1]]
        chunk = min(10, last - expected)
        assert owner(documents, pair.a[-1]) == own and owner(documents, pair.b[-1]) == other
        assert pair.is_random == (own != other)
        if pair.is_random:
            expected = pair.a[-1] + 1
            end = documents.sentences[documents.firsts[other + 1]]
            assert len(pair.b) == min(10 - len(pair.a), end - pair.b[0]) or len(pair.a) == 10
        else:
            assert pair.b[0] == pair.a[-1] + 1
            assert len(pair.a) + len(pair.b) == chunk
            expected = pair.b[-1] + 1
        assert chunk > 1 or pair.is_random, "one sentence has no next one"
    assert expected == len(documents.tokens)


def test_choices_have_the_original_distributions():
    documents = numbered([[1] * 40] * 50)
    found = pairs_of(documents, settings(13, dupe_factor=40))
    full = [p for p in found if p.a[0] % 40 <= 30]  # ten sentences are left in the document
    assert len(full) > 8000
    random = [p for p in full if p.is_random]
    assert abs(len(random) / len(full) - 0.5) < 2.5 / np.sqrt(len(full))
    split = collections.Counter(len(pair.a) for pair in full)
    assert even([split[n] for n in range(1, 10)], len(full) / 9) and set(split) == set(range(1, 10))
    start = collections.Counter(pair.b[0] % 40 for pair in random)
    assert even([start[n] for n in range(40)], len(random) / 40)
    shift = collections.Counter((p.b[0] // 40 - p.a[0] // 40) % 50 for p in random)
    assert shift[0] == 0, "never from the same document"
    assert even([shift[n] for n in range(1, 50)], len(random) / 49)


def test_the_length_that_is_aimed_at_is_drawn_for_each_document():
    documents = numbered([[1] * 100] * 3000)
    longest = collections.Counter()
    for pair in pairs_of(documents, settings(13, short_seq_prob=0.3)):
        if not pair.is_random:  # a random one of a sentence may be shorter than what is aimed at
            number = pair.a[0] // 100
            longest[number] = max(longest[number], len(pair.a) + len(pair.b))
    lengths = collections.Counter(longest.values())
    share = (0.7 + 0.3 / 9) * 3000
    assert abs(lengths[10] - share) < 5 * np.sqrt(share * 0.3)
    assert even([lengths[n] for n in range(2, 10)], 3000 * 0.3 / 9)


def test_the_longer_segment_is_truncated_at_either_end():
    lengths = np.random.default_rng(1).integers(1, 120, (400, 2)).tolist()
    documents = numbered(lengths)
    fronts = []
    for pair in pairs_of(documents, settings(33, dupe_factor=12)):
        first = documents.sentences[np.searchsorted(documents.sentences, pair.a[0], "right") - 1]
        if pair.is_random:
            continue
        own = owner(documents, pair.a[0])
        a, b = lengths[own]
        lost_a = lost_b = 0
        while a + b > 30:  # the original procedure, but for the choice of the end
            if a > b:
                a, lost_a = a - 1, lost_a + 1
            else:
                b, lost_b = b - 1, lost_b + 1
        assert (len(pair.a), len(pair.b)) == (a, b)
        fronts.append((pair.a[0] - first, lost_a))
        fronts.append((pair.b[0] - first - lengths[own][0], lost_b))
    front, lost = np.array(fronts).T
    assert (front >= 0).all() and (front <= lost).all() and lost.sum() > 20000
    # The sum over binomials: mean and variance are sums too.
    assert abs(front.sum() - lost.sum() / 2) < 5 * np.sqrt(lost.sum() / 4)
    spread = ((front - lost / 2) ** 2).sum() / (lost.sum() / 4)
    assert 0.8 < spread < 1.25


def test_documents_that_only_lend_are_not_cut():
    documents = numbered([[3] * 12] * 30)
    found = pairs_of(documents, settings(13), own=4)
    assert {owner(documents, pair.a[0]) for pair in found} == {0, 1, 2, 3}
    assert max(owner(documents, pair.b[0]) for pair in found) > 20


def test_duplicates_blocks_and_seeds_are_cut_differently():
    documents = numbered([[5] * 30] * 20)
    one = settings(33)

    def tokens(**options):
        return {tuple(p.a.tolist() + p.b.tolist()) for p in pairs_of(documents, one, **options)}

    assert tokens() == tokens()
    assert len(tokens() & tokens(block=1)) < len(tokens()) / 4
    twice = pairs_of(documents, dataclasses.replace(one, dupe_factor=2))
    both = {tuple(p.a.tolist() + p.b.tolist()) for p in twice}
    assert tokens() < both and len(both) > 1.7 * len(tokens())
    one = settings(33, random_seed=4)
    assert len(tokens() & both) < len(both) / 4


def test_sentences_and_documents_without_tokens_are_dropped():
    arranged = tokenized_documents.arrange(
        np.arange(10),
        np.array([0, 3, 0, 0, 2, 5, 0]),
        np.array([1, 2, 1, 1, 2]),
        [4, 7, 9, 11, 11],
    )
    assert arranged.numbers.tolist() == [7, 11], "the pieces of document 11 are one"
    assert arranged.sentences.tolist() == [0, 3, 5, 10]
    assert arranged.firsts.tolist() == [0, 1, 3]


def test_a_sample_holds_the_first_and_the_last_document():
    documents = numbered([[4] * 300, [7], [2] * 40, [1]])
    lent = tokenized_documents.sample(documents, pieces=8, tokens_each=10)
    assert lent.numbers[0] == 0 and lent.numbers[-1] == 3
    for piece in range(len(lent)):
        places = lent.sentences[lent.firsts[piece] : lent.firsts[piece + 1] + 1]
        tokens = lent.tokens[places[0] : places[-1]]
        assert 1 <= len(tokens) <= 10 and (np.diff(tokens) == 1).all()
        assert {owner(documents, token) for token in tokens} == {lent.numbers[piece]}
    rest = tokenized_documents.without(lent, np.array([0, 2]))
    assert (
        {owner(documents, token) for token in rest.tokens}
        == set(rest.numbers)
        == {1, 3} - ({1} - set(lent.numbers))
    )
    assert rest.sentences[-1] == len(rest.tokens) and rest.firsts[-1] == len(rest.sentences) - 1


def test_a_single_document_is_refused():
    with pytest.raises(ValueError, match="at least two documents"):
        examples.build(numbered([[3, 4]]), settings(13), *SPECIAL)


@pytest.fixture(scope="module")
def built():
    documents = made_up_documents(400, seed=0)
    return list(examples.build_examples(documents, VOCABULARY, SETTINGS, seed=5))


def test_every_example_has_the_shape_of_bert(built):
    assert len(built) > 1500
    for example in built:
        used = sum(example["input_mask"])
        tokens = np.array(example["input_ids"])
        assert len(tokens) == len(example["segment_ids"]) == len(example["input_mask"]) == 48
        assert example["input_mask"] == [1] * used + [0] * (48 - used)
        assert tokens[0] == CLS and tokens[used - 1] == SEP and (tokens[used:] == PAD).all()
        first_end = int(np.flatnonzero(tokens == SEP)[0])
        if list(tokens).count(SEP) == 2:  # [SEP] is one of 65 replacements
            rest = used - first_end - 1
            assert example["segment_ids"] == [0] * (first_end + 1) + [1] * rest + [0] * (48 - used)
            assert 1 < first_end < used - 2, "both segments hold tokens"
        count = min(7, max(1, round(0.15 * used)))
        assert example["masked_lm_weights"] == [1.0] * count + [0.0] * (7 - count)
        positions = example["masked_lm_positions"][:count]
        assert positions == sorted(set(positions))
        assert not {CLS, SEP, PAD} & set(example["masked_lm_ids"][:count])


def test_masking_follows_80_10_10(built):
    kinds = collections.Counter()
    for example in built:
        count = int(sum(example["masked_lm_weights"]))
        for position, label in zip(
            example["masked_lm_positions"][:count], example["masked_lm_ids"], strict=False
        ):
            token = example["input_ids"][position]
            kinds["mask" if token == MASK else "kept" if token == label else "replaced"] += 1
    draws = sum(kinds.values())
    assert draws > 5000
    # Four standard deviations of a binomial; a replacement hits the same token one time in 65.
    for kind, share in (("mask", 0.8), ("kept", 0.1), ("replaced", 0.1)):
        tolerance = 4 * np.sqrt(share * (1 - share) / draws) + 0.1 / 65 + 0.1 / 65
        assert abs(kinds[kind] / draws - share) < tolerance, (kind, kinds)


def test_the_same_seed_gives_the_same_examples():
    documents = made_up_documents(20, seed=0)
    first, again, other = (
        list(examples.build_examples(documents, VOCABULARY, SETTINGS, seed)) for seed in (5, 5, 6)
    )
    assert first == again != other


def test_rows_are_serialised_as_protobuf_serialises_them():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 200, 64)
    used = np.arange(200) < lengths[:, None]
    rows = {
        "input_ids": (rng.integers(0, 2**20, (64, 200)) * used).astype(np.int32),
        "input_mask": used.astype(np.int32),
        "masked_lm_weights": used[:, :20].astype(np.float32),
        "next_sentence_labels": rng.integers(0, 2, (64, 1)).astype(np.int32),
    }
    for row, record in enumerate(record_rows.serialize_rows(rows)):
        example = tf.train.Example()
        for name, values in rows.items():
            feature = example.features.feature[name]
            kind = feature.float_list if "weights" in name else feature.int64_list
            kind.value.extend(values[row].tolist())
        assert record == example.SerializeToString(deterministic=True)
        one = {name: values[row].tolist() for name, values in rows.items()}
        assert record_rows.serialize(one) == record
