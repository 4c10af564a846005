"""The F16 file run by llama.cpp against an independent implementation of each architecture."""

from __future__ import annotations

import numpy as np
import pytest

from engine import native
from tests.checkpoints import FAMILIES, SHAPES, make_weights
from tests.reference import chatglm3, deepseek_llm, qwen

REFERENCES = {"qwen": qwen, "chatglm3": chatglm3, "deepseek-llm": deepseek_llm}
N_POSITIONS, N_LIKELIEST, LIMIT, KL_LIMIT = 200, 1000, 2e-2, 1e-4


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def run(path, ids):
    with native.Model(path) as model:
        context = native.Context(model, 256, n_threads=2, n_batch=256)
        context.decode(ids, 0, logits="all")
        found = context.logits_all()
        context.close()
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, converted):
    """Log-probabilities of the reference and of llama.cpp, (N_POSITIONS, n_vocab) each."""
    family = request.param
    shape = SHAPES[family]
    ids = np.random.default_rng(5).integers(0, shape.n_vocab, N_POSITIONS).tolist()
    expected = REFERENCES[family].logits(make_weights(family, shape), shape, ids)
    return log_softmax(expected), log_softmax(run(converted(family), ids))


def test_log_probabilities_agree(both):
    expected, found = both
    likeliest = np.argsort(-expected, axis=-1)[:, :N_LIKELIEST]
    difference = np.abs(np.take_along_axis(expected - found, likeliest, axis=-1))
    assert difference.shape == (N_POSITIONS, N_LIKELIEST)
    assert difference.max() < LIMIT


def test_likeliest_id_agrees_where_the_margin_exceeds_the_limit(both):
    expected, found = both
    first, second = np.sort(expected, axis=-1)[:, [-1, -2]].T
    clear = first - second > LIMIT
    assert clear.sum() > N_POSITIONS / 2
    assert (expected.argmax(axis=-1) == found.argmax(axis=-1))[clear].all()


def test_divergence_is_far_below_that_of_any_known_mistake(both):
    expected, found = both
    divergence = (np.exp(expected) * (expected - found)).sum(axis=-1)
    assert divergence.max() < KL_LIMIT
