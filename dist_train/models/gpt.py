"""A small GPT in plain PyTorch: reads symbols, and gives scores of the one that follows each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class GPT(nn.Module):
    """A causal transformer with learned positions and one matrix for reading and writing symbols.

    `[B, T]` int64, T at most `context` -> `[B, T, K]`: scores of what follows each symbol, from it and those
    before it. Dropout is on what each layer adds, not within the attention, whose fused kernels stay in use.

    Shape and initial weights: Radford et al., 2019 (GPT-2); plain layers and no biases in them: nanoGPT.

    Args:
        num_classes: symbols there are.
        input_shape: `(T,)`, the length of a training sequence: the context, where none is given.
        depth, heads, width: layers, attention heads in each, and numbers for each symbol.
        context: how many symbols the model looks back on at most.
        dropout: share of what a layer adds that is dropped in training.
    """

    def __init__(
        self,
        num_classes: int = 256,
        input_shape: Sequence[int] = (256,),
        depth: int = 4,
        heads: int = 4,
        width: int = 128,
        context: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.context = context or input_shape[0]
        if self.context < input_shape[0]:
            raise ValueError(f"context {context} is shorter than sequences of {input_shape[0]}")
        if width % heads:
            raise ValueError(f"width {width} can't be shared by {heads} heads")
        self.symbols = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(self.context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.apply(_initialize)
        for name, weight in self.named_parameters():
            if name.endswith(("attended.weight", "contracted.weight")):
                # So that depth doesn't widen what all blocks add up to.
                nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """`[B, T]` -> `[B, T, K]`."""
        places = torch.arange(symbols.shape[1], device=symbols.device)
        x = self.dropout(self.symbols(symbols) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.symbols.weight)


class Block(nn.Module):
    """Attention to what came before, then a layer for each place alone; each adds to its normalized input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.expanded = nn.Linear(width, 4 * width, bias=False)
        self.contracted = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, width]` -> the same shape."""
        # [B, T, 3 * width] -> query, key and value, [B, heads, T, width / heads] each
        parts = self.attention(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.attended(mixed.transpose(1, 2).flatten(2)))
        hidden = nn.functional.gelu(self.expanded(self.norm2(x)))
        return x + self.dropout(self.contracted(hidden))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
