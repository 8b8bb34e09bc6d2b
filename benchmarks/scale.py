"""What grows with the number of processes and samples, for jobs far beyond this machine.

    python benchmarks/scale.py              # some minutes on two cores
    python benchmarks/scale.py --ranks 64   # quick

Simulated: the agreement of ranks at a start and the watchdog's words, through a real TCPStore, with the
requests of all ranks made by a few processes of this machine; what one rank computes in a collective, in
torch's fake process group, whose collectives move nothing; the order of 10^9 samples. Arithmetic, marked as
such: the traffic of collectives per rank, and the time of a checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from overhead import processor  # noqa: E402

from dist_train.data.order import Order  # noqa: E402
from dist_train.runtime import MANY_RANKS, _agree  # noqa: E402
from dist_train.tree import sum_over_ranks  # noqa: E402

HELPERS = 4  # processes that make the requests of all other ranks
MODELS = {"ResNet-50": 25.6e6, "ViT-L": 304e6, "1 billion": 1e9, "7 billion": 7e9}  # weights
DISK, WHOLE = 1e9, 500e9  # bytes a second that a rank can write, and that a file system takes of all
MEETING = 50 * 2 + 5  # numbers: 50 steps of two sums, five flags, in float64
SUMS = 2000  # bytes of a rank's pickled sums of an evaluation: some batches of three values


def client(port: int) -> dist.TCPStore:
    """A connection to the store."""
    return dist.TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=300))


def as_ranks(port: int, ranks: Sequence[int]) -> None:
    """What these ranks do at a start: as `_agree` does, then publish as the watchdog does."""
    store = client(port)
    store.add("imported", 1)
    store.get("agree")
    names = {rank: os.urandom(8).hex() for rank in ranks}
    for rank, name in names.items():
        store.set(f"greeting/{rank}", name)
    for rank, name in names.items():
        attempt = store.get(f"answer/{name}").decode()
        store.set(f"thanks/{attempt}/{rank}", "")
    store.get("go")
    for rank in ranks:
        store.set(f"at/{rank}", json.dumps([12.5, 48_210, "computing", "node-0123", 31.25, 240.5]))
    store.add("done", 1)


def at_the_store(world_size: int) -> list[float]:
    """Seconds until all ranks have agreed, and until all have published where they are."""
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=300))
    context = multiprocessing.get_context("forkserver")
    shares = [range(1 + number, world_size, HELPERS) for number in range(HELPERS)]
    helpers = [context.Process(target=as_ranks, args=(store.port, share)) for share in shares]
    for helper in helpers:
        helper.start()
    wait_for(store, "imported", HELPERS)
    times = [time.perf_counter()]
    store.set("agree", "")
    _agree(store, 0, world_size, 300)
    times.append(time.perf_counter())
    store.set("go", "")
    wait_for(store, "done", HELPERS)
    times.append(time.perf_counter())
    for helper in helpers:
        helper.join()
    return [after - before for before, after in itertools.pairwise(times)]


def connections(count: int = 256) -> float:
    """Seconds a connection to the store, when many are made at once.

    The least of some rounds: where no name server answers, torch waits for it at some of them.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    seconds = []
    for _ in range(5):
        with ThreadPoolExecutor(count) as pool:
            begin = time.perf_counter()
            made = list(pool.map(client, [store.port] * count))
            seconds.append((time.perf_counter() - begin) / len(made))
    return min(seconds)


def wait_for(store: dist.TCPStore, key: str, count: int) -> None:
    """Waits until the number at `key` is `count`."""
    while store.add(key, 0) < count:
        time.sleep(0.01)


def own_work(world_size: int) -> tuple[float, float]:
    """Seconds that a rank computes to add up 100 MB of gradients, and the numbers of a meeting."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    gradients = torch.ones(25_000_000)
    meeting = torch.ones(MEETING, dtype=torch.float64)
    times: list[list[float]] = [[], []]
    for _ in range(5):
        for numbers, seconds in zip((gradients, meeting), times, strict=True):
            begin = time.perf_counter()
            sum_over_ranks(numbers, world_size)
            seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return statistics.median(times[0]), statistics.median(times[1])


def order() -> tuple[float, float, int]:
    """Seconds to the first batch at a far step, seconds a batch of 4,096, and MB more than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = Order(10**9, 4096, seed=1)
    begin = time.perf_counter()
    samples.global_batch(1_234_567)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for step in range(100):
        samples.global_batch(step)
    each = (time.perf_counter() - begin) / 100
    return first, each, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def disk() -> float:
    """Bytes a second that this machine writes of a gigabyte, until it is safe."""
    with tempfile.NamedTemporaryFile(dir=ROOT) as file:
        begin = time.perf_counter()
        torch.save(torch.ones(250_000_000), file)
        os.fsync(file.fileno())
        return 1e9 / (time.perf_counter() - begin)


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 1024, 16_384])
    torch.set_num_threads(1)
    titles = "to agree, s | all publish, s | 100 MB, ms | a meeting, ms | a meeting, KB"
    print(f"| ranks | {titles} | an evaluation, MB |\n{'| --- ' * 7}|")
    for world_size in parser.parse_args().ranks:
        store = " | ".join(f"{seconds:.2f}" for seconds in at_the_store(world_size))
        gradients, meeting = own_work(world_size)
        sent = 8 * (MEETING * world_size if world_size <= MANY_RANKS else 2 * max(MEETING, world_size))
        cells = f"{store} | {gradients * 1e3:.0f} | {meeting * 1e3:.1f} | {sent / 1e3:,.0f}"
        print(f"| {world_size:,} | {cells} | {SUMS * world_size / 1e6:.1f} |", flush=True)
    print("\nTimes are simulated, KB and MB are arithmetic.")
    print(f"A connection to the store takes {connections() * 1e3:.2f} ms where 256 are made at once.\n")
    first, each, more = order()
    print(f"Order of 10^9 samples: {first * 1e3:.1f} ms to the batch of step 1,234,567,")
    print(f"{each * 1e3:.2f} ms for a batch of 4,096, {more} MB of memory.\n")
    print("| weights | a checkpoint, GB | one file, s | in parts on 64 ranks, s | on 1,024, s |")
    print("| --- | --- | --- | --- | --- |")
    for name, weights in MODELS.items():
        size = weights * 4 * 4  # weights, average, two moments
        parts = [size / min(ranks * DISK, WHOLE) for ranks in (64, 1024)]
        times = " | ".join(f"{seconds:.2f}" for seconds in (size / DISK, *parts))
        print(f"| {name} | {size / 1e9:.1f} | {times} |")
    print(f"\nThis machine's disk took {disk() / 1e9:.2f} GB/s of one rank (measured).")
    most = f"no more than {WHOLE / 1e9:.0f} GB/s"
    print(f"\nArithmetic: a rank writes {DISK / 1e9:.0f} GB/s, all together {most}.")
    print(f"{processor()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
