"""Probabilities from a draft's logits and the noise, and what is learnt from the draws."""

import numpy as np
import pytest

from jlayer.drafting.scores import Calibration, Sharpness, log_softmax, perturbed


def gumbel(rng, size):
    return -np.log(-np.log(rng.random(size)))


def guessed(logits, noise, *, temperature, sharpness):
    return log_softmax(perturbed(logits, noise, temperature=temperature) / sharpness)


def test_without_temperature_the_noise_plays_no_part():
    logits = np.array([[1.0, 2.0, -1.0], [0.0, 0.0, 4.0]])
    noise = np.array([[3.0, -1.0, 0.5], [1.0, 2.0, 0.0]])
    greedy = guessed(logits, None, temperature=0.0, sharpness=0.6)
    assert np.allclose(np.exp(greedy).sum(axis=-1), 1)
    assert np.allclose(greedy[0, 1] - greedy[0, 0], 1 / 0.6)
    assert np.allclose(greedy, guessed(logits, noise, temperature=0.0, sharpness=0.6))
    near = guessed(logits, noise, temperature=1e-9, sharpness=0.6)
    assert np.allclose(greedy, near), "the limit of small temperatures"
    warm = guessed(logits, noise, temperature=0.5, sharpness=0.6)
    assert np.allclose(warm[0, 1] - warm[0, 0], (1 + 0.5 * (-1 - 3)) / 0.6)


@pytest.mark.parametrize("true", [0.15, 0.6, 1.8])
def test_the_sharpness_is_learnt_from_draws(true):
    rng = np.random.default_rng(5)
    sharpness = Sharpness()
    assert sharpness.value == 0.6
    for _ in range(1500):
        perturbed = rng.normal(0, 2, 48)
        drawn = int(np.argmax(perturbed / true + gumbel(rng, 48)))
        sharpness.observe(perturbed, drawn)
    assert sharpness.value == pytest.approx(true, rel=0.12)


def test_a_draw_that_was_no_candidate_lowers_the_coverage_alone():
    sharpness = Sharpness()
    assert sharpness.coverage == 1.0
    sharpness.observe(np.array([1.0, 0.0]), None)
    assert sharpness.value == Sharpness.START
    assert 0.9 < sharpness.coverage < 1.0
    for number in range(4000):
        sharpness.observe(np.array([1.0, 0.0]), None if number % 4 == 0 else 0)
    assert sharpness.coverage == pytest.approx(0.75, abs=0.01)


def test_the_calibration_follows_what_was_found_and_is_bounded():
    calibration = Calibration()
    assert calibration.ratio == 1.0
    calibration.observe(2.0, 4.0)
    assert 1.0 < calibration.ratio < 1.2, "slowly"
    for _ in range(2000):
        calibration.observe(2.0, 1.4)
    assert calibration.ratio == pytest.approx(0.7, abs=0.01)
    for _ in range(5000):
        calibration.observe(2.0, 0.0)
    assert calibration.ratio == Calibration.LEAST
