"""Ids, masks and embeddings of the real TensorFlow, in the environment that `.ci/tensorflow`
makes."""

import subprocess
import sys

import numpy as np
import pytest

from jlayer import AutoModel, UsageError

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: run .ci/tensorflow")

ROWS = [[5, 17, 99, 3], [44, 101, 7, 9]]
LEFT = [[1, 1, 1, 1], [0, 0, 1, 1]]
GREEDY = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(fable):
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as opened:
        yield opened


def is_eager(value, dtype):
    return tf.is_tensor(value) and value.dtype == dtype and hasattr(value, "numpy")


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_ids_and_masks_come_in_and_go_out(model, dtype):
    expected = model.generate(ROWS, attention_mask=LEFT, **GREEDY)
    vectors = model.encode({"input_ids": ROWS, "attention_mask": LEFT})
    ids = tf.constant(ROWS, dtype)
    for mask in (tf.constant(LEFT, dtype), tf.cast(LEFT, tf.bool), np.array(LEFT)):
        found = model.generate(ids, attention_mask=mask, **GREEDY)
        assert is_eager(found, dtype)
        assert found.numpy().tolist() == expected
        embedded = model.encode({"input_ids": ids, "attention_mask": mask})
        assert is_eager(embedded, tf.float32)
        np.testing.assert_array_equal(embedded.numpy(), vectors)
    flat = model.generate(ids[0], **GREEDY)
    assert is_eager(flat, dtype)
    assert flat.numpy().tolist() == expected[0]
    assert is_eager(model.encode(ids[0]), tf.float32)
    logits = model.logits(ids)
    assert isinstance(logits, np.ndarray)
    np.testing.assert_array_equal(logits, model.logits(ROWS))
    np.testing.assert_array_equal(model(ids, attention_mask=tf.ones_like(ids)).logits, logits)


def test_variables_and_lists_of_tensors(model):
    expected = model.generate(ROWS, **GREEDY)
    found = model.generate(tf.Variable(tf.constant(ROWS, tf.int64)), **GREEDY)
    assert is_eager(found, tf.int64)
    assert found.numpy().tolist() == expected
    assert model.generate([tf.constant(row) for row in ROWS], **GREEDY) == expected


def test_what_else_comes_back_is_of_the_same_kind(model):
    how = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "num_beams": 2}
    found = model.generate(tf.constant(ROWS), **how)
    assert is_eager(found.sequences, tf.int32)
    assert is_eager(found.sequences_scores, tf.float32)
    assert is_eager(found.beam_indices, tf.int32)
    assert all(is_eager(scores, tf.float32) for scores in found.scores)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16])
def test_embeddings(model, dtype):
    made = np.random.default_rng(0).normal(size=(2, 4, model.config.hidden_size))
    given = tf.cast(tf.constant(made, tf.float32), dtype)
    exact = tf.cast(given, tf.float32).numpy()
    found = model.generate(inputs_embeds=given, attention_mask=tf.constant(LEFT), **GREEDY)
    assert is_eager(found, tf.int64)
    expected = model.generate(inputs_embeds=exact, attention_mask=LEFT, **GREEDY)
    assert found.numpy().tolist() == expected.tolist()
    logits = model.logits(inputs_embeds=exact)
    np.testing.assert_array_equal(model.logits(inputs_embeds=given), logits)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tf.ragged.constant([[5, 17], [99]]), "found RaggedTensor"),
        (lambda: tf.sparse.from_dense(tf.constant(ROWS)), "found SparseTensor"),
        (lambda: tf.constant([["a", "b"]]), "found "),
        (lambda: tf.constant([[0.5, 1.5]]), "found "),
    ],
    ids=["ragged", "sparse", "words", "numbers"],
)
def test_what_is_no_array_of_ids_is_refused_in_one_line(model, make, says):
    given = make()
    for ask in (model.generate, model.encode, model.logits):
        refused(ask, given, says)
    refused(lambda one: model.generate(inputs_embeds=one), given, says)


def test_tensors_of_a_graph_are_refused_in_one_line(model):
    """They have no numbers yet."""
    says, asked = "SymbolicTensor: an array that cannot be read on the host", []

    @tf.function
    def graph(ids):
        for ask in (model.generate, model.encode, model.logits):
            refused(ask, ids, says)
            asked.append(ask)
        vectors = tf.cast(ids, tf.float32)[..., None]
        refused(lambda one: model.generate(inputs_embeds=one), vectors, says)
        return ids

    graph(tf.constant(ROWS))
    assert len(asked) == 3


def refused(ask, given, says):
    with pytest.raises(UsageError, match=says) as caught:
        ask(given)
    assert "\n" not in str(caught.value)


def test_it_is_imported_for_nothing(fable):
    """Where it is installed and nobody has imported it."""
    code = (
        "import sys, numpy as np, jlayer\n"
        f"with jlayer.AutoModel.from_pretrained({str(fable)!r}, device='cpu') as model:\n"
        f"    model.encode(model.generate(np.array({ROWS}), max_new_tokens=2))\n"
        "    made = np.zeros((1, 2, model.config.hidden_size), np.float32)\n"
        "    model.generate(inputs_embeds=made, max_new_tokens=2)\n"
        "print(*{'torch', 'tensorflow', 'cupy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
