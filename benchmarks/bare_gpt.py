"""A GPT by dist_train beside the same one by a bare loop of PyTorch: do both learn the same?

Both begin with the same weights and read the same bytes in the same order. The loop has a model, a reading of
the files, a loss, a schedule, clipping and an evaluation of its own. Prints bits per byte of both.

python benchmarks/bare_gpt.py                       # two epochs of configs/gpt.yaml, without dropout
python benchmarks/bare_gpt.py train.epochs=10       # all of it, in minutes
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from dist_train import fit, load
from dist_train.config import Config
from dist_train.models import build
from dist_train.seeds import generator, key, seed_weights

CONFIG = Path(__file__).parents[1] / "configs/gpt.yaml"
WORDS = ["model.args.dropout=0", "wandb.mode=disabled", "device=cpu", "threads=1", "train.epochs=2",
         "eval.every=never", "checkpoint.every=never"]  # fmt: skip


def sequences(files: list[Path], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and the bytes that follow them, `[N, context]`; each file ends with a byte 0."""
    stream = b"".join(file.read_bytes() + b"\0" for file in files)
    missing = -len(stream) % context
    targets = torch.tensor(list(stream) + [-100] * missing)
    inputs = torch.tensor([0, *stream, *[0] * missing])[: len(targets)]
    return inputs.view(-1, context), targets.view(-1, context)


def scores(w: dict[str, torch.Tensor], symbols: torch.Tensor, depth: int, heads: int) -> torch.Tensor:
    """Of the symbol that follows each one, `[B, T]` -> `[B, T, 256]`, by weights `w`."""
    x = F.embedding(symbols, w["symbols.weight"]) + w["positions.weight"][: symbols.shape[1]]
    shape = (*symbols.shape, heads, x.shape[2] // heads)
    for n in range(depth):
        of = {name: w[f"blocks.{n}.{name}.weight"] for name in NAMES}
        y = F.linear(F.layer_norm(x, x.shape[2:], of["norm"]), of["attention"])
        query, key, value = (part.view(shape).transpose(1, 2) for part in y.chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(x.shape), of["attended"])
        y = F.gelu(F.linear(F.layer_norm(x, x.shape[2:], of["norm2"]), of["expanded"]))
        x = x + F.linear(y, of["contracted"])
    return F.linear(F.layer_norm(x, x.shape[2:], w["norm.weight"]), w["symbols.weight"])


NAMES = ("norm", "attention", "attended", "norm2", "expanded", "contracted")


def nats(
    w: dict[str, torch.Tensor], symbols: torch.Tensor, targets: torch.Tensor, config: Config
) -> torch.Tensor:
    """-log of the probability of each target, `[B x T]`; 0 for -100."""
    depth, heads = config.model.args["depth"], config.model.args["heads"]
    return F.cross_entropy(
        scores(w, symbols, depth, heads).flatten(0, 1), targets.flatten(), reduction="none"
    )


def clip(gradients: list[torch.Tensor], most: float) -> None:
    """Scales a gradient whose norm is greater than `most`.

    The norm is added up by rows, as dist_train does it: torch's clip_grad_norm_ rounds otherwise, and of that
    alone trainings drift apart, the faster the higher their rate.
    """
    rows = [g.abs() if g.ndim < 2 else torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    norm = torch.linalg.vector_norm(torch.cat(rows))
    torch._foreach_mul_(gradients, torch.clamp(most / (norm + 1e-6), max=1.0))


def bare(config: Config, train: list[Path], held: list[Path]) -> float:
    """Bits per byte of the files `held` after a training on the files `train`."""
    context, batch = config.data.args["context"], config.train.batch_size
    seed_weights(config.seed)
    initial = build("gpt", config.model.args, (context,), 256).state_dict()
    w = {name: value.clone().requires_grad_() for name, value in initial.items()}
    optimizer = torch.optim.AdamW(w.values(), lr=config.optim.lr, fused=True, **config.optim.args)
    inputs, targets = sequences(train, context)
    per_epoch = math.ceil(len(inputs) / batch)
    total = config.train.steps or config.train.epochs * per_epoch
    warmup = config.schedule.warmup
    for step in range(total):
        epoch, number = divmod(step, per_epoch)
        order = torch.randperm(len(inputs), generator=generator(key(config.seed, "order", epoch)))
        rows = order[number * batch : (number + 1) * batch]
        late = max(0, step - warmup) / max(1, total - 1 - warmup)
        share = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * late)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * share
        (nats(w, inputs[rows], targets[rows], config) / len(rows)).sum().backward()
        gradients = [weight.grad for weight in w.values()]
        torch._foreach_mul_(gradients, len(rows) / (targets[rows] >= 0).sum())  # divided by what counts
        clip(gradients, config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    inputs, targets = sequences(held, context)
    with torch.no_grad():
        some = zip(inputs.split(16), targets.split(16), strict=True)
        loss = sum(float(nats(w, *each, config).double().sum()) for each in some)
    return loss / int((targets >= 0).sum()) / math.log(2)


def compare(config: Config) -> tuple[float, float]:
    """Bits per byte by dist_train, which leaves its run in `config.run_dir`, and by the bare loop."""
    root, names = Path(config.data.root or ""), config.data.args["eval_files"]
    held = sorted(root.glob(names))
    # Of several links to a file the first.
    by_file = {path.resolve(): path for path in sorted(root.glob("**/*"), reverse=True) if path.is_file()}
    train = sorted(path for path in by_file.values() if path not in held)
    torch.set_num_threads(1)
    return fit(config).metrics["eval/bits_per_byte"], bare(config, train, held)


def main() -> None:
    """Trains both and prints what they reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ours, theirs = compare(load([CONFIG], [*WORDS, *sys.argv[1:]]))
    apart = f"{abs(ours - theirs):.1e} apart"
    print(f"bits per byte: {ours:.9f} by dist_train, {theirs:.9f} by a bare loop, {apart}")


if __name__ == "__main__":
    main()
