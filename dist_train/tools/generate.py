"""Text that a trained language model goes on with, one byte after the other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dist_train.config import UserError, completed
from dist_train.seeds import generator, key
from dist_train.trained import load_model


def continue_prompt(
    place: str | Path,
    prompt: str,
    length: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    trust: bool = False,
) -> str:
    """`prompt` and up to `length` bytes more, the same ones each time; it ends where the text would.

    Args:
        place: a run's folder or a checkpoint file.
        temperature: 0 takes the most probable byte, 1 draws by the model's probabilities, more is wilder.
        seed: another one gives another text.
        trust: as for `load_model`.

    Raises UserError for a run that is no language model of bytes.
    """
    model, saved = load_model(place, trust=trust)
    task, shape = completed(saved["config"])["task"]["name"], saved["sample_shape"]
    if task != "language" or len(shape) != 1 or len(saved["classes"]) != 256:
        raise UserError(f"{place}: continues no text; its task is '{task}', not 'language' on bytes.")
    written = prompt.encode(errors="surrogateescape")
    written += _continued(model, written, length, temperature, seed, context=shape[0])
    return written.decode(errors="replace")


@torch.inference_mode()
def _continued(
    model: nn.Module, prompt: bytes, length: int, temperature: float, seed: int, *, context: int
) -> bytes:
    """The bytes that follow `prompt`; a byte 0, which stands between texts, begins and ends them."""
    symbols, draws = [0, *prompt], generator(key(seed, "text"))
    for _ in range(length):
        scores = model(torch.tensor([symbols[-context:]]))[0, -1].double()
        if temperature:
            chosen = int(torch.multinomial((scores / temperature).softmax(0), 1, generator=draws))
        else:
            chosen = int(scores.argmax())
        if chosen == 0:
            break
        symbols.append(chosen)
    return bytes(symbols[1 + len(prompt) :])
