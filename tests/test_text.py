"""Found text."""

from pretraining import found_data, found_text

DOCSTRING = """Return the mean of the values in the given array, as a float number.

The mean is the sum of all values that are in the array, over the number of them. See
:func:`numpy.sum` for the sum, and ``numpy.size`` for the number of the values.

Args:
    values: an array of numbers, which must not be empty when it is given to this function.

axis : int, optional
    The axis along which the mean is to be computed, which is the last one by default.

>>> mean([1, 2, 3])  # this is a test of the documentation and it is not prose at all.

=====  =====
left   right
=====  =====
"""


def test_prose_is_kept_and_code_and_parameters_are_not():
    assert list(found_text.prose_paragraphs(DOCSTRING)) == [
        "Return the mean of the values in the given array, as a float number.",
        "The mean is the sum of all values that are in the array, over the number of them. See "
        "numpy.sum for the sum, and numpy.size for the number of the values.",
    ]


def test_this_installation_holds_enough_text_and_no_paragraph_twice():
    found = list(found_text.find_documents(1_000_000))
    paragraphs = [paragraph for _, document in found for paragraph in document]
    assert sum(len(p.encode()) + 1 for p in paragraphs) >= 1_000_000
    assert len({p.lower() for p in paragraphs}) == len(paragraphs)
    assert len({name for name, _ in found}) == len(found)


def test_held_out_documents_share_no_sentence_with_training():
    found = [
        (f"package/module{i}.py", [f"This is sentence number {i}. It stands here alone.", shared])
        for i, shared in enumerate(["Everybody has this sentence. And this one."] * 200)
    ]
    train, held_out = found_data.split_documents(found)
    training = {sentence for document in train for sentence in document}
    assert "Everybody has this sentence." in training
    assert 0 < len(held_out) < 30
    for document in held_out:
        assert document and training.isdisjoint(document)
