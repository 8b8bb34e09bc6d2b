"""What grows with the number of processes and samples, for jobs far beyond this machine.

    python benchmarks/scale.py              # some minutes on two cores
    python benchmarks/scale.py --ranks 64   # quick

Simulated: the agreement of ranks at a start and the watchdog's words, through a real TCPStore, with the
requests of all ranks made by a few processes of this machine; the order of 10^9 samples. Arithmetic, marked
as such: the traffic of collectives per rank, and the time of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from overhead import processor  # noqa: E402

from dist_train.data.order import Order  # noqa: E402
from dist_train.runtime import MANY_RANKS, _agree  # noqa: E402

HELPERS = 4  # processes that make the requests of all other ranks
MODELS = {"ResNet-50": 25.6e6, "ViT-L": 304e6, "1 billion": 1e9, "7 billion": 7e9}  # weights
DISK, WHOLE = 1e9, 500e9  # bytes a second that a rank can write, and that a file system takes of all
SUMS = 2000  # bytes of a rank's pickled sums of an evaluation: some batches of three values


def as_ranks(port: int, ranks: Sequence[int], world_size: int) -> None:
    """What `_agree` and the watchdog do on these ranks, one after the other."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    names = {rank: os.urandom(8).hex() for rank in ranks}
    for rank, name in names.items():
        store.set(f"greeting/{rank}", name)
    for rank, name in names.items():
        attempt = store.get(f"answer/{name}").decode()
        store.set(f"thanks/{attempt}/{rank}", "")
    store.get("go")
    for rank in ranks:
        store.set(f"at/{rank}", json.dumps([12.5, 48_210, "computing"]))
    store.add("done", 1)


def agreement(world_size: int) -> tuple[float, float]:
    """Seconds until all ranks have agreed, and until each has published where it is."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=300))
    context = multiprocessing.get_context("forkserver")
    shares = [range(1 + number, world_size, HELPERS) for number in range(HELPERS)]
    helpers = [context.Process(target=as_ranks, args=(store.port, share, world_size)) for share in shares]
    for helper in helpers:
        helper.start()
    while not all(store.check([f"greeting/{share[0]}"]) for share in shares):  # they import torch
        time.sleep(0.01)
    begin = time.perf_counter()
    _agree(store, 0, world_size, 300)
    agreed = time.perf_counter() - begin
    begin = time.perf_counter()
    store.set("go", "")
    while store.add("done", 0) < HELPERS:
        time.sleep(0.01)
    published = time.perf_counter() - begin
    for helper in helpers:
        helper.join()
    return agreed, published


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


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 1024, 16_384])
    print("| ranks | to agree, s | all publish, s | a meeting, KB a rank | an evaluation, MB a rank |")
    print("| --- | --- | --- | --- | --- |")
    for world_size in parser.parse_args().ranks:
        agreed, published = agreement(world_size)
        count = 50 * 2 + 5  # 50 steps of two sums, five flags, in float64
        meeting = 8 / 1e3 * (count * world_size if world_size <= MANY_RANKS else 2 * max(count, world_size))
        evaluation = SUMS * world_size / 1e6
        cells = f"{agreed:.2f} | {published:.2f} | {meeting:,.0f} | {evaluation:.1f}"
        print(f"| {world_size:,} | {cells} |", flush=True)
    print("\nTo agree and to publish are simulated, the rest is arithmetic.\n")
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
    most = f"no more than {WHOLE / 1e9:.0f} GB/s"
    print(f"\nArithmetic: a rank writes {DISK / 1e9:.0f} GB/s, all together {most}.")
    print(f"{processor()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
