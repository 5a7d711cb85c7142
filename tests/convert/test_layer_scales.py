"""Scales of layers: errors of equal energy cost the same afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from xkv_gguf.convert.capture import Sums
from xkv_gguf.convert.layer_scales import group_weights, layer_scales, scaled
from xkv_gguf.convert.solve import covariance
from xkv_gguf.sidecar.info import Group


def test_squares_are_cost_per_energy() -> None:
    weights = {"k": (4.0, 1.0, 9.0), "v": (1.0, 1.0, 1.0)}
    variances = {"k": (1.0, 1.0, 1.0), "v": (16.0, 4.0, 1.0)}
    found = layer_scales(weights, variances)
    for kind in ("k", "v"):
        cost = np.array(weights[kind]) / np.array(variances[kind])
        squares = np.square(found[kind])
        np.testing.assert_allclose(squares / squares[0], cost / cost[0], rtol=0.03)  # three digits
        assert np.prod(found[kind]) == pytest.approx(1.0, rel=0.05)


def test_a_layer_without_variance_stays_as_it_is() -> None:
    found = layer_scales({"k": (4.0, 1.0, 1.0), "v": (1.0,) * 3}, {"k": (1.0, 0.0, 1.0), "v": (0.0,) * 3})
    assert found["k"][1] == 1.0
    assert found["k"][0] == pytest.approx(2 * found["k"][2], rel=0.05)
    assert found["v"] == (1.0, 1.0, 1.0)


def test_scaled_sums_are_those_of_scaled_numbers() -> None:
    rng = np.random.default_rng(3)
    x, by_number = rng.normal(1.0, 2.0, (50, 5)), np.array([0.5, 0.5, 3.0, 3.0, 3.0])
    sums = Sums(x.T @ x, x.sum(0), len(x))
    found = scaled(sums, (0.5, 3.0), (2, 3))
    y = x * by_number
    np.testing.assert_allclose(found.gram, y.T @ y)
    np.testing.assert_allclose(found.total, y.sum(0))
    assert found.n_tokens == 50


def test_what_a_group_costs_is_what_its_layers_cost() -> None:
    """The weight of a group of scaled layers times its relative loss is the sum over its layers, up to one factor."""
    rng = np.random.default_rng(4)
    weights = {kind: tuple(rng.uniform(0.1, 5.0, 4)) for kind in ("k", "v")}
    variances = {kind: tuple(rng.uniform(0.1, 5.0, 4)) for kind in ("k", "v")}
    scales = layer_scales(weights, variances)
    by_group, factor = group_weights(weights, [Group((0, 1)), Group((2, 3))])
    for kind in ("k", "v"):
        lost = rng.uniform(0.0, 0.1, 4)  # energy, by layer
        cost = np.array(weights[kind]) * lost / np.array(variances[kind])
        square = np.square(scales[kind])
        for g, layers in enumerate((slice(0, 2), slice(2, 4))):
            relative = (square * lost)[layers].sum() / (square * np.array(variances[kind]))[layers].sum()
            assert factor * by_group[kind][g] * relative == pytest.approx(cost[layers].sum(), rel=0.15)  # two digits


def test_scaling_makes_the_covariance_weigh_by_cost() -> None:
    """Of two layers with the same energy, the first direction is the one that costs more."""
    rng = np.random.default_rng(5)
    x = rng.normal(0.0, 1.0, (400, 2))
    sums = scaled(Sums(x.T @ x, x.sum(0), len(x)), (0.2, 1.0), (1, 1))
    cov, _ = covariance(sums.gram, sums.total, sums.n_tokens)
    assert np.abs(np.linalg.eigh(cov)[1][:, -1]).argmax() == 1
