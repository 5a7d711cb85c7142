"""Layers on devices: as llama.cpp divides them, and with borders that cut no group."""

from __future__ import annotations

import pytest

from xkv_gguf.plan.placement import HOST, Placement, at_group_borders, place_layers

GROUPS = ((0, 1, 2), (3, 4, 5), (6, 7))


@pytest.mark.parametrize(
    ("n_gpu_layers", "shares", "layers"),
    [
        (-1, (1.0,), (0,) * 8),
        (0, (1.0,), (HOST,) * 8),
        (-1, (), (HOST,) * 8),
        (8, (1.0,), (HOST, *(0,) * 7)),  # the output is one
        (-1, (1.0, 1.0), (0,) * 5 + (1,) * 3),
        (4, (1.0, 1.0), (HOST,) * 5 + (0, 0, 1)),
        (-1, (0.0, 2.0), (1,) * 8),
    ],
)
def test_layers_are_divided_as_llama_cpp_does(n_gpu_layers: int, shares: tuple[float, ...], layers: object) -> None:
    assert place_layers(8, n_gpu_layers, shares).layers == layers


def test_borders_move_to_the_nearest_ones_between_groups() -> None:
    placed = at_group_borders(place_layers(8, -1, (1.0, 1.0)), GROUPS)
    assert placed.layers == (0,) * 6 + (1,) * 2
    assert placed.counts == (6, 3)  # the output is on the last device
    assert at_group_borders(placed, GROUPS) == placed


def test_the_host_keeps_whole_groups() -> None:
    assert at_group_borders(place_layers(8, 8, (1.0,)), GROUPS).n_gpu_layers == 9
    placed = at_group_borders(place_layers(8, 5, (1.0,)), GROUPS)
    assert placed.layers == (HOST,) * 3 + (0,) * 5
    assert placed.n_gpu_layers == sum(placed.counts) == 6


def test_more_devices_than_groups_leave_some_without_layers() -> None:
    placed = at_group_borders(place_layers(8, -1, (1.0,) * 6), ((0, 1, 2, 3), (4, 5, 6, 7)))
    assert sum(placed.counts) == 9
    assert set(placed.layers[:4]) == {placed.layers[0]} and set(placed.layers[4:]) == {placed.layers[4]}


def test_layers_in_turns_cannot_be_parted() -> None:
    placed = at_group_borders(place_layers(8, -1, (1.0, 1.0)), ((0, 2, 4, 6), (1, 3, 5, 7)))
    assert len(set(placed.layers)) == 1


def test_nothing_on_devices_stays_so() -> None:
    assert at_group_borders(place_layers(8, 0, (1.0,)), GROUPS) == Placement(8, 0, (0,))
    # the output alone
    assert at_group_borders(place_layers(8, 1, (1.0,)), GROUPS).layers == (HOST,) * 8
