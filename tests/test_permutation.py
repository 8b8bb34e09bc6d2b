"""The order of very many samples, of which no process ever holds the whole."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dist_train.data import order
from dist_train.data.order import DistributedSampler, Order
from dist_train.data.permutation import permuted
from dist_train.seeds import key

MANY = 1_000_000_007
ORDER = "[246160458, 243378379, 21553214, 584971223]"  # so that a run of an earlier version goes on with it


@pytest.mark.parametrize("lengths", [range(200), (1023, 1024, 1025, 65_537, 99_991)])
def test_every_position_stands_once_in_the_order(lengths: range | tuple[int, ...]) -> None:
    for length in lengths:
        assert sorted(permuted(length, 3, 0, length).tolist()) == list(range(length))


def test_a_slice_is_that_of_the_whole() -> None:
    whole = permuted(5003, 3, 0, 5003)
    for first, last in ((0, 1), (17, 4711), (5000, 5003), (9, 9)):
        assert np.array_equal(permuted(5003, 3, first, last), whole[first:last])


def test_seeds_and_neighbours_have_nothing_in_common() -> None:
    """What chance would do within six standard deviations: for 250,000 places in two orders of 10^9."""
    count = 250_000
    one, other = (permuted(MANY, seed, 0, count) for seed in (3, 4))
    for values in (one, other, (one - other) % MANY, np.diff(one) % MANY):
        bins = np.bincount(values * 50 // MANY, minlength=50)
        expected = len(values) / 50
        chi = ((bins - expected) ** 2 / expected).sum()
        assert abs(chi - 49) < 6 * (2 * 49) ** 0.5
    # The lowest bits, too, and whole epochs far away.
    far = permuted(MANY, 3, MANY - count, MANY)
    for values in (one & 1, far & 1, (one ^ other) & 1, far < MANY // 2):
        assert abs(values.mean() - 0.5) < 6 * 0.5 / count**0.5


def test_all_orders_of_five_come_about_equally_often() -> None:
    orders = [tuple(permuted(5, seed, 0, 5).tolist()) for seed in range(2400)]
    counts = [orders.count(one) for one in set(orders)]
    assert len(counts) == 120
    assert sum((count - 20) ** 2 / 20 for count in counts) < 119 + 6 * (2 * 119) ** 0.5


def test_the_order_is_the_same_in_any_process_and_version() -> None:
    assert str(permuted(MANY, 3, 10, 14).tolist()) == ORDER  # each run of the tests is another process


# --- the sampler -------------------------------------------------------------------------------------


def test_the_cipher_takes_over_at_a_length_that_never_changes() -> None:
    assert Order(2**24, 8).positions(0, 0, 4).tolist() == [11380388, 269959, 6205063, 6726979]


def test_ranks_share_every_epoch_of_a_long_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "LONG", 1)
    length, batch, per_epoch = 61, 12, 6
    whole = Order(length, batch, seed=3)
    epochs = [whole.positions(epoch) for epoch in range(2)]
    assert not np.array_equal(*epochs)
    assert all(sorted(epoch.tolist()) == list(range(length)) for epoch in epochs)
    for world in (1, 2, 3):
        ranks = [
            list(DistributedSampler(whole, range(2 * per_epoch), world, rank, world)) for rank in range(world)
        ]
        read = [part.indices[: part.size] for parts in zip(*ranks, strict=True) for part in parts]
        assert np.array_equal(np.concatenate(read), np.concatenate(epochs))


def test_a_run_of_a_thousand_million_samples_goes_on_anywhere_at_once() -> None:
    batch, step = 4096, 1_234_567
    tracemalloc.start()
    part = next(iter(DistributedSampler(Order(MANY, batch, seed=3), range(step, 10**9))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    epoch, number = divmod(step, -(-MANY // batch))
    assert part.epoch == epoch == 5 and number > 0
    assert np.array_equal(part.indices, Order(MANY, batch, seed=3).global_batch(step))
    assert len(set(part.indices.tolist())) == batch
    assert peak < 2**20


def test_a_rank_of_very_many_looks_up_its_own_samples_only() -> None:
    """Its share of a global batch of a million is some sixty samples: it doesn't hold the others."""
    ranks, batch = 16_384, 2**20
    tracemalloc.start()
    (part,) = DistributedSampler(Order(MANY, batch, seed=3), range(5, 6), ranks, 77, ranks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (part.size, part.total, part.number) == (64, batch, 77)
    assert np.array_equal(
        part.indices, permuted(MANY, key(3, "order", 0), 5 * batch + 77 * 64, 5 * batch + 78 * 64)
    )
    assert peak < batch
