"""Random numbers that are drawn for many samples at once."""

from __future__ import annotations

import numpy as np

from dist_train.data.draws import beta, uniform

INDICES = np.arange(50_000)


def test_what_is_drawn_for_a_sample_does_not_depend_on_the_others() -> None:
    whole = uniform(3, 5, INDICES, "crop", 4)
    some = np.array([49_999, 7, 7, 123])
    assert np.array_equal(uniform(3, 5, some, "crop", 4), whole[some])
    assert np.array_equal(uniform(3, 5, some, "crop", 2), whole[some, :2])  # more may be drawn later
    assert uniform(3, 5, some[:0], "crop", 4).shape == (0, 4)


def test_draws_are_what_they_were_in_earlier_versions() -> None:
    """So that a run of an earlier version goes on with them."""
    drawn = uniform(1, 2, np.array([0, 10**12]), "crop", 2)
    expected = [[6421811411855483, 37480259288982], [7017189437572269, 1259787420861800]]
    assert (drawn * 2**53).astype(int).tolist() == expected


def test_draws_look_like_chance() -> None:
    """Over samples, draws, seeds, epochs and purposes: within six standard deviations."""
    arguments = [(0, 0, "crop"), (1, 0, "crop"), (0, 1, "crop"), (0, 0, "flip")]
    drawn = [uniform(seed, epoch, INDICES, purpose, 4) for seed, epoch, purpose in arguments]
    columns = np.concatenate(drawn, axis=1).T  # [16, B]
    assert columns.min() >= 0 and columns.max() < 1
    for column in columns:
        bins = np.bincount((column * 50).astype(int), minlength=50)
        assert abs(bins - 1000).max() < 6 * 1000**0.5
    related = np.corrcoef(np.concatenate([columns, np.roll(columns, 1, axis=1)])) - np.eye(32)
    assert abs(related).max() < 6 / 50_000**0.5


def test_shares_are_spread_as_the_beta_distribution_has_them() -> None:
    drawn = (np.arange(2000) + 0.5) / 2000
    assert np.allclose(beta(1.0, drawn), drawn, atol=1e-12)
    assert np.allclose(beta(0.5, drawn), np.sin(np.pi / 2 * drawn) ** 2, atol=1e-6)  # the arcsine's law
    cubic = beta(2.0, drawn)
    assert np.allclose(3 * cubic**2 - 2 * cubic**3, drawn, atol=1e-6)
    for alpha in (0.05, 0.2, 0.4, 0.8, 1.5, 8.0, 100.0):
        values = beta(alpha, drawn)
        assert (np.diff(values) >= 0).all() and np.allclose(values + values[::-1], 1)
        assert abs(values.var() * 4 * (2 * alpha + 1) - 1) < 0.01
