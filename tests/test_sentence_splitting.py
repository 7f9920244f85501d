"""Sentences are those of tensorflow-text's breaker, found faster."""

import tensorflow as tf
import tensorflow_text
from hypothesis import given, settings
from hypothesis import strategies as st

from pretraining import found_text
from pretraining.sentence_splitting import split_sentences

# Ends of sentences, parts of emoticons, acronyms, and runs of plain text of every length.
PIECES = [
    *".!?:;-)(DXxo83_^<>='\"*/|@#, ",
    "…",
    "。",
    "é",
    "U.S.",
    "e.g.",
    "a.b",
    "XD",
    ":-)",
    "8-)",
]


def unshortened(paragraphs):
    """What the breaker itself says."""
    lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
    found = tensorflow_text.StateBasedSentenceBreaker().break_sentences(tf.constant(lines))
    return [[sentence.decode() for sentence in line] for line in found.to_list()]


def test_sentences_are_split_at_their_ends_and_no_character_is_cut():
    paragraphs = ["Et voilà.\u00a0Où va-t-il?\u2003Là.", "Only one sentence is here."]
    assert split_sentences(paragraphs) == [
        ["Et voilà.", "Où va-t-il?", "Là."],
        ["Only one sentence is here."],
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(
            st.one_of(st.sampled_from(PIECES), st.text("abcXDU128 ,", min_size=1, max_size=30)),
            max_size=30,
        ).map("".join),
        min_size=1,
        max_size=40,
    )
)
def test_leaving_out_plain_text_changes_no_sentence(paragraphs):
    assert split_sentences(paragraphs) == unshortened(paragraphs)


def test_prose_is_split_as_the_breaker_splits_it():
    found = found_text.find_documents(60_000)
    paragraphs = [paragraph for _, document in found for paragraph in document]
    assert split_sentences(paragraphs) == unshortened(paragraphs)
