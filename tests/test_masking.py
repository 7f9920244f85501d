"""Masking of batches beside the loop of google-research/bert's script, written again here."""

import collections

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from pretraining import masking
from pretraining.masking import MaskSettings
from pretraining.vocabulary import SPECIAL_TOKENS, Vocabulary

PAD, UNK, CLS, SEP, MASK = range(5)
WORDS, PIECES = 40, 25
TOKENS = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(WORDS)), *(f"##p{i}" for i in range(PIECES))]
VOCABULARY = Vocabulary(tuple(TOKENS))
TABLE = masking.token_table(VOCABULARY)
FIRST_PIECE = 5 + WORDS
few = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)


def mask(ids, keys, settings, input_mask=None, table=TABLE, graph=True):
    """Masks, in a graph for any number of rows if so wished; returns NumPy arrays."""
    if input_mask is None:
        input_mask = ids != PAD

    def run(ids, input_mask, keys):
        return masking.mask_tokens(ids, input_mask, keys, table, settings)

    if graph:
        rows = tf.TensorSpec([None, ids.shape[1]], tf.int32)
        run = tf.function(run, [rows, rows, tf.TensorSpec([None, 2], tf.uint32)])
    arguments = [ids.astype(np.int32), input_mask.astype(np.int32), keys]
    masked = run(*(tf.constant(argument) for argument in arguments))
    return {name: value.numpy() for name, value in masked.items()}


def keys_of(rows, seed=1, first=0):
    return masking.row_keys(seed, tf.range(first, first + rows, dtype=tf.int64)).numpy()


def text_rows(rows, length, seed=0, pieces=0.3, shortest=2):
    """[CLS] A [SEP] B [SEP] [PAD]..., in which any token may be a piece of a word."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(UNK, FIRST_PIECE, [rows, length])
    ids[ids == CLS] = ids[ids == SEP] = UNK
    piece = rng.random([rows, length]) < pieces
    ids[piece] = rng.integers(FIRST_PIECE, len(TOKENS), piece.sum())
    for row in ids:
        end = rng.integers(shortest, length + 1)
        row[0], row[rng.integers(1, end)], row[end - 1], row[end:] = CLS, SEP, SEP, PAD
    return ids


def choose_by_hand(row, input_mask, scores, settings):
    """create_masked_lm_predictions of google-research/bert, with the order of visits given."""
    words, before = [], False
    for place, token in enumerate(row):
        candidate = TOKENS[token] not in ("[CLS]", "[SEP]", "[PAD]") and bool(input_mask[place])
        piece = settings.do_whole_word_mask and TOKENS[token].startswith("##")
        if candidate and piece and before:
            words[-1].append(place)
        elif candidate:
            words.append([place])
        before = candidate
    words.sort(key=lambda word: (-int(scores[word[0]]), word[0]))
    number = min(
        settings.max_predictions_per_seq,
        max(1, round(int(sum(input_mask)) * settings.masked_lm_prob)),
    )
    chosen = []
    for word in words:
        if len(chosen) >= number:
            break
        if len(chosen) + len(word) <= number:
            chosen += word
    return sorted(chosen)


def check_against_the_loop(ids, settings, keys, input_mask=None, graph=True):
    got = mask(ids, keys, settings, input_mask, graph=graph)
    input_mask = ids != PAD if input_mask is None else input_mask
    scores = masking.visit_scores(tf.constant(keys), ids.shape[1]).numpy()
    places = settings.max_predictions_per_seq
    for i, row in enumerate(ids):
        expected = choose_by_hand(row, input_mask[i], scores[i], settings)
        padding = [0] * (places - len(expected))
        assert got["masked_lm_positions"][i].tolist() == expected + padding
        assert got["masked_lm_ids"][i].tolist() == row[expected].tolist() + padding
        assert got["masked_lm_weights"][i].tolist() == [1.0] * len(expected) + padding
        others = np.setdiff1d(np.arange(len(row)), expected)
        np.testing.assert_array_equal(got["input_word_ids"][i][others], row[others])
    return got


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("pieces", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize(("length", "places"), [(128, 20), (64, 5), (512, 76), (12, 20), (3, 1)])
def test_the_same_tokens_as_the_loop(length, places, pieces, whole):
    settings = MaskSettings(max_predictions_per_seq=places, do_whole_word_mask=whole)
    ids = text_rows(60, length, seed=length, pieces=pieces)
    got = check_against_the_loop(ids, settings, keys_of(60))
    for name, values in got.items():
        assert values.dtype == (np.float32 if "weights" in name else np.int32), name


@pytest.mark.parametrize("whole", [False, True])
def test_equal_scores_leave_the_order_of_the_row(monkeypatch, whole):
    scores = masking.visit_scores
    monkeypatch.setattr(masking, "visit_scores", lambda *a: scores(*a) % 3 + 1)
    settings = MaskSettings(do_whole_word_mask=whole)
    check_against_the_loop(text_rows(60, 128), settings, keys_of(60))


@pytest.mark.parametrize("probability", [0.15, 0.5, 1.0])
def test_words_that_leave_a_rest_are_all_visited(probability):
    """One short word among longer ones fills the rest, however late its turn comes."""
    ids = np.full([40, 128], 7)
    ids[:, 2::3] = ids[:, 3::3] = FIRST_PIECE  # words of three
    ids[np.arange(40), 1 + 3 * np.arange(40)] = CLS  # and one of two, a ## piece first
    ids[:, 0] = CLS
    settings = MaskSettings(masked_lm_prob=probability, do_whole_word_mask=True)
    got = check_against_the_loop(ids, settings, keys_of(40))
    # 128 * 0.15 rounds to 19: six words leave one over, five of three and the one of two leave 2.
    late = got["masked_lm_weights"].sum(1)
    assert set(late) <= {17, 18, 19, 20}
    assert probability == 0.15 or 20 in late


def test_a_row_is_masked_alike_alone_and_in_any_batch():
    ids, keys = text_rows(33, 64), keys_of(33, seed=5, first=1000)
    settings = MaskSettings(max_predictions_per_seq=10, do_whole_word_mask=True)
    whole = mask(ids, keys, settings)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 33, 5), slice(None, None, -1)):
        part = mask(ids[rows], keys[rows], settings)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][rows])


def test_rows_beside_one_that_needs_all_words_do_not_change():
    """A row of long words sends the batch on the longer way."""
    ids, keys = text_rows(2, 128, pieces=0.0, shortest=128), keys_of(2)
    ids[1] = np.where(np.arange(128) % 2, 7, FIRST_PIECE)  # words of two, a budget of 19
    settings = MaskSettings(do_whole_word_mask=True)
    both, one = mask(ids, keys, settings), mask(ids[:1], keys[:1], settings)
    assert both["masked_lm_weights"].sum(1).tolist() == [19, 19]  # its first piece stands alone
    for name, values in one.items():
        np.testing.assert_array_equal(values[0], both[name][0])


@st.composite
def batches(draw):
    length, rows = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    tokens = st.sampled_from([PAD, UNK, CLS, SEP, MASK, 5, 6, 7, FIRST_PIECE, FIRST_PIECE + 1])
    row = st.lists(tokens, min_size=length, max_size=length)
    ids = np.array(draw(st.lists(row, min_size=rows, max_size=rows)))
    ends = np.array(draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows)))
    settings = MaskSettings(
        masked_lm_prob=draw(st.sampled_from([0.01, 0.15, 0.5, 1.0])),
        max_predictions_per_seq=draw(st.integers(1, 45)),
        do_whole_word_mask=draw(st.booleans()),
    )
    return ids, np.arange(length) < ends[:, None], settings, draw(st.integers(0, 2**32))


@few
@hypothesis.given(batches())
def test_any_tokens_are_masked_as_the_loop_does(batch):
    ids, input_mask, settings, seed = batch
    check_against_the_loop(ids, settings, keys_of(len(ids), seed), input_mask, graph=False)


@pytest.mark.parametrize("whole", [False, True])
def test_rows_without_candidates_stay_as_they_are(whole):
    ids = np.array([[CLS, SEP, SEP, PAD], [CLS, 9, FIRST_PIECE, FIRST_PIECE], [PAD] * 4])
    settings = MaskSettings(max_predictions_per_seq=2, do_whole_word_mask=whole)
    got = mask(ids, keys_of(3), settings)
    # The second row's only word is longer than its budget of 1.
    assert got["masked_lm_weights"].sum(1).tolist() == [0, not whole, 0]
    np.testing.assert_array_equal(got["input_word_ids"][[0, 2]], ids[[0, 2]])


@pytest.mark.parametrize("probability", [0.15, 0.1, 0.25, 0.35])
def test_the_number_is_rounded_as_python_rounds(probability):
    """At 10 tokens, 0.15 * n is 1.5: rounded to the even 2; at 30 it is 4.5, rounded to 4."""
    lengths = np.arange(3, 131)
    ids = np.where(np.arange(130) < lengths[:, None], 9, PAD)
    settings = MaskSettings(masked_lm_prob=probability, max_predictions_per_seq=40)
    counts = mask(ids, keys_of(len(lengths)), settings)["masked_lm_weights"].sum(1)
    expected = [min(40, max(1, round(n * probability))) for n in lengths.tolist()]
    assert counts.tolist() == expected


def test_the_table_knows_pieces_and_special_tokens():
    table = masking.token_table(Vocabulary(("a", "##b", "[MASK]", "[SEP]", "[CLS]", "[PAD]", "#")))
    assert table.kinds.tolist() == [1, 2, 1, 0, 0, 0, 1] and table.mask_id == 2


def test_it_runs_in_a_map_and_follows_seed_and_position_alone():
    ids = text_rows(24, 32)
    settings = MaskSettings(max_predictions_per_seq=5)
    rows = tf.data.Dataset.from_tensor_slices((ids.astype(np.int32), np.arange(24)))

    def mask_batch(ids, positions):
        real = tf.cast(ids != PAD, tf.int32)
        return masking.mask_tokens(ids, real, masking.row_keys(3, positions), TABLE, settings)

    def masked(batch):
        dataset = rows.batch(batch).map(mask_batch, num_parallel_calls=2)
        return np.concatenate([b["input_word_ids"].numpy() for b in dataset])

    expected = mask(ids, keys_of(24, seed=3), settings)["input_word_ids"]
    for batch in (1, 5, 24):
        np.testing.assert_array_equal(masked(batch), expected)


ROWS, LENGTH, PLACES, VOCAB = 20_000, 48, 8, 60_000
WORD = 77  # every token of the statistics


def many_rows(keys):
    """Masks rows of one word; returns which places were taken, and what stands there."""
    kinds = np.ones(VOCAB, np.int32)
    table = masking.TokenTable(kinds=kinds, mask_id=MASK)
    settings = MaskSettings(masked_lm_prob=0.5, max_predictions_per_seq=PLACES)
    got = mask(np.full([ROWS, LENGTH], WORD), keys, settings, table=table)
    positions = got["masked_lm_positions"]
    taken = np.zeros([ROWS, LENGTH])
    np.put_along_axis(taken, positions, 1, 1)
    return taken, np.take_along_axis(got["input_word_ids"], positions, 1)


KEYS = {
    "positions": keys_of(ROWS, seed=7),
    "next seed": keys_of(ROWS, seed=8),
    "large seed, late positions": keys_of(ROWS, seed=2**32, first=10**12),
    "plain numbers": np.stack([np.arange(ROWS), np.zeros(ROWS)], 1).astype(np.uint32),
}


@pytest.fixture(scope="module")
def masked_rows():
    return {name: many_rows(keys) for name, keys in KEYS.items()}


def check_chi_square(counts, degrees=None):
    """Within 4.5 standard deviations of what a uniform distribution gives."""
    degrees = degrees or counts.size - 1
    mean = counts.mean()
    statistic = ((counts - mean) ** 2).sum() / mean
    assert abs(statistic - degrees) < 4.5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("name", KEYS)
def test_every_place_is_masked_equally_often(masked_rows, name):
    counts = masked_rows[name][0].sum(0)
    # Without replacement the variance is smaller by the part not taken.
    check_chi_square(counts.mean() + (counts - counts.mean()) / np.sqrt(1 - PLACES / LENGTH))


def check_independent(a, b):
    """No correlation between any place of the rows `a` and any of the rows `b`."""
    p = PLACES / LENGTH
    z = (a - p).T @ (b - p) / np.sqrt(len(a)) / (p * (1 - p))
    assert np.abs(z).max() < 6
    assert np.mean(z**2) == pytest.approx(1, abs=4.5 * np.sqrt(2 / z.size))


@pytest.mark.parametrize("distance", [1, 2, 8])
@pytest.mark.parametrize("name", KEYS)
def test_neighbouring_rows_are_independent(masked_rows, name, distance):
    taken = masked_rows[name][0]
    check_independent(taken[distance:], taken[:-distance])


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_neighbouring_seeds_are_independent(masked_rows, shift):
    a, b = masked_rows["positions"][0], masked_rows["next seed"][0]
    check_independent(a[shift:], b[: ROWS - shift])


@pytest.mark.parametrize("name", KEYS)
def test_every_pair_of_places_is_masked_together_equally_often(masked_rows, name):
    taken = masked_rows[name][0]
    together = (taken.T @ taken)[np.triu_indices(LENGTH, 1)]
    p = PLACES / LENGTH * (PLACES - 1) / (LENGTH - 1)
    z = (together - ROWS * p) / np.sqrt(ROWS * p * (1 - p))
    assert np.abs(z).max() < 5.5
    assert 0.75 < np.mean(z**2) < 1.2


@pytest.mark.parametrize("name", KEYS)
def test_eight_in_ten_become_mask_and_one_stays(masked_rows, name):
    stands = masked_rows[name][1]
    for token, p in ((MASK, 0.8), (WORD, 0.1)):
        p += 0.1 / VOCAB
        found = (stands == token).sum()
        assert abs(found - stands.size * p) < 4 * np.sqrt(stands.size * p * (1 - p))
    replaced = ~np.isin(stands, [MASK, WORD])
    # Decided for each token: two places of a row agree no more often than by chance.
    expected, both = replaced.mean() ** 2, (replaced[:, 1:] & replaced[:, :-1]).mean()
    assert abs(both - expected) < 4.5 * np.sqrt(expected / stands.size)


def test_replacements_are_any_token_of_the_vocabulary_equally_often(masked_rows):
    stands = np.concatenate([masked_rows[name][1].ravel() for name in KEYS])
    replaced = stands[~np.isin(stands, [MASK, WORD])]
    assert replaced.size > 50_000 and replaced.min() < 10 and replaced.max() >= VOCAB - 10
    check_chi_square(np.bincount(replaced // 600, minlength=100).astype(float))
    check_chi_square(np.bincount(replaced % 128, minlength=128)[:96].astype(float))


def test_small_vocabularies_get_all_ids():
    """Special tokens too, as in the original script."""
    settings = MaskSettings(masked_lm_prob=1.0, max_predictions_per_seq=64)
    got = mask(np.full([4000, 64], 9), keys_of(4000), settings)
    counts = collections.Counter(got["input_word_ids"].ravel().tolist())
    others = np.array([counts[i] for i in range(len(TOKENS)) if i not in (MASK, 9)], float)
    check_chi_square(others)


def test_keys_differ_for_all_positions_and_seeds():
    keys = [keys_of(5000, seed) for seed in (0, 1, 2, 2**31, 2**32)]
    assert len(np.unique(np.concatenate(keys).view(np.uint64))) == 25_000


def test_half_the_bits_of_neighbouring_keys_differ():
    keys = [keys_of(4001, seed).view(np.uint8) for seed in (7, 8)]
    for different in (keys[0][1:] ^ keys[0][:-1], keys[0] ^ keys[1]):
        bits = np.unpackbits(different, axis=1).mean(0)
        assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(4000)


def test_all_64_bits_of_a_key_count():
    """Were it 32, about eight pairs of these rows would be masked at the same places."""
    scores = masking.visit_scores(tf.constant(keys_of(2**18)), 2).numpy()
    assert len(np.unique(scores.view(np.uint64))) == 2**18
