"""Orders are permutations, and those of small maps are what the papers draw."""

from itertools import pairwise

import pytest
import torch

from mambaout_kernels.comparators import scan_orders

DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
ORDERS = {
    "bidirectional": (2, scan_orders.bidirectional),
    "cross": (4, scan_orders.cross),
    "continuous": (4, scan_orders.continuous),
    "atrous": (4, scan_orders.atrous),
    "local": (4, scan_orders.local),
    "local of 2": (4, lambda height, width: scan_orders.local(height, width, 2)),
    "named": (8, lambda height, width: scan_orders.named(height, width, DIRECTIONS)),
}


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 3), (7, 7), (8, 6), (9, 15)])
@pytest.mark.parametrize("name", ORDERS)
def test_every_scan_visits_each_token_once(name, size):
    scans, make = ORDERS[name]
    order = make(*size)
    L = size[0] * size[1]
    assert order.shape == (scans, L)
    assert order.dtype == torch.int32
    assert all(sorted(row) == list(range(L)) for row in order.tolist())


def test_orders_of_2_by_3():
    """Tokens 0 1 2
    3 4 5"""
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    assert scan_orders.bidirectional(2, 3).tolist() == [rows, rows[::-1]]
    assert scan_orders.cross(2, 3).tolist() == [rows, columns, rows[::-1], columns[::-1]]
    assert scan_orders.atrous(2, 3).tolist() == [rows, columns, rows, columns]
    snake, snake_of_columns = [0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5]
    expected = [snake, snake[::-1], snake_of_columns, snake_of_columns[::-1]]
    assert scan_orders.continuous(2, 3).tolist() == expected


def test_windows_that_divide_the_map():
    assert scan_orders.windows(4, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_windows_on_a_map_that_is_no_multiple():
    """3 x 5 by windows of 2: 2 x 2, 2 x 2, 2 x 1 above; 1 x 2, 1 x 2, 1 x 1 below."""
    assert scan_orders.windows(3, 5, 2).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]


def test_a_window_of_the_map_or_larger_is_row_by_row():
    assert scan_orders.windows(3, 5, 7).tolist() == list(range(15))


def test_named_orders():
    order = scan_orders.named(3, 5, ("v_flip", "w2", "h"))
    assert order[0].tolist() == [14, 9, 4, 13, 8, 3, 12, 7, 2, 11, 6, 1, 10, 5, 0]
    assert torch.equal(order[1], scan_orders.windows(3, 5, 2))
    assert order[2].tolist() == list(range(15))
    assert torch.equal(scan_orders.named(3, 5, ("h", "h_flip", "w7", "w7_flip")), scan_orders.local(3, 5, 7))


@pytest.mark.parametrize("name", ["", "x", "w", "w0", "w-1", "h_", "flip", "_flip"])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="a scan is"):
        scan_orders.named(4, 4, (name,))


@pytest.mark.parametrize("size", [(1, 4), (4, 1), (3, 4), (4, 3), (5, 5)])
def test_continuous_scans_step_to_neighbours(size):
    order = scan_orders.continuous(*size).long()
    row, column = order // size[1], order % size[1]
    assert (row.diff(dim=1).abs() + column.diff(dim=1).abs() == 1).all()


def test_continuous_directions_of_2_by_3():
    start, right, left, up, down = range(5)
    assert scan_orders.continuous_directions(2, 3).tolist() == [
        [start, right, right, left, left, down],
        [left, left, up, start, right, right],
        [start, up, right, down, right, down],
        [up, left, up, left, down, start],
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (5, 4)])
def test_continuous_directions_lead_from_token_to_token(size):
    order, directions = scan_orders.continuous(*size).tolist(), scan_orders.continuous_directions(*size).tolist()
    step = {scan_orders.RIGHT: 1, scan_orders.LEFT: -1, scan_orders.UP: -size[1], scan_orders.DOWN: size[1]}
    for tokens, of_token in zip(order, directions, strict=True):
        assert of_token[tokens[0]] == scan_orders.START
        for before, token in pairwise(tokens):
            assert token - before == step[of_token[token]]


def test_cached_orders():
    x = torch.empty(1)
    first = scan_orders.cached(scan_orders.cross, x, 3, 4)
    assert torch.equal(first, scan_orders.cross(3, 4))
    assert scan_orders.cached(scan_orders.cross, x, 3, 4) is first
    assert not torch.equal(scan_orders.cached(scan_orders.cross, x, 4, 3), first)
    assert scan_orders.cached(scan_orders.cross, x.to("meta"), 3, 4).is_meta


def test_cached_orders_are_never_fake():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        scan_orders.cached(scan_orders.cross, torch.empty(1), 3, 29)
    assert type(scan_orders.cached(scan_orders.cross, torch.empty(1), 3, 29)) is torch.Tensor


def test_an_order_cached_in_inference_serves_training():
    with torch.inference_mode():
        order = scan_orders.cached(scan_orders.cross, torch.empty(1), 3, 31)
    assert not order.is_inference()
