"""Work that threads do ahead of time, in the order in which it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, most: int
) -> Iterator[Result]:
    """`function` of each item, in their order, by so many threads; an error comes up in its place.

    Args:
        most: how many results may wait or be in the making.
    """
    # Each thread computes by itself; torch would give it a team of its own, and take over its number.
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "ahead", torch.set_num_threads, (1,))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(before)
