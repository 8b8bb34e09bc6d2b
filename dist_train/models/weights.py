"""The weights that a run begins with: from another run, a file or a URL, fitted to its model.

The run keeps a copy of them in its folder, from which all that begins at step 0 reads again: an attempt after
one that saved nothing, and `replay`. So they are part of the run, whatever becomes of where they came from.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_train import checkpoint
from dist_train.config import Config, UserError, to_mapping

COPY = "init.safetensors"  # in the run's folder


class Weights(NamedTuple):
    """The tensors of a model's state by their names, and where they came from."""

    tensors: dict[str, Any]  # and what modules keep beside tensors
    where: str


def first(config: Config) -> Weights | None:
    """What `model.init` names, or the run's own copy of it, if it names anything.

    Raises UserError, naming the key, for what is not there or holds no weights.
    """
    place, shown = config.model.init, _shown(config)
    if not place:
        return None
    copy = config.run_dir / COPY
    if copy.exists() and _origin(copy) == shown:
        return Weights(checkpoint.load_weights(copy), f"{shown}, as kept in {copy}")
    try:
        path = _download(place, shown) if "://" in place else Path(place)
        if path.is_file():
            return Weights(checkpoint.load_weights(path), shown)
        path = checkpoint.find(path)
        return Weights(checkpoint.load_weights(path), f"{shown} ({path.name})")
    except UserError as error:
        raise UserError(f"model.init: {error}") from None


def keep(config: Config, weights: Weights) -> None:
    """Copies the first weights into the run's folder."""
    copy, shown = config.run_dir / COPY, _shown(config)
    if _origin(copy) == shown:
        return
    if lost := checkpoint.save_weights(copy, weights.tensors, {"init": shown}):
        copy.unlink()
        raise UserError(
            f"model.init: {weights.where} holds more than plain values as {lost[0]}, of which the run could"
            " keep no copy."
        )


def kept(run: Path) -> Weights:
    """The first weights of a run. Raises UserError if its folder holds none."""
    if not (run / COPY).is_file():
        raise UserError(f"{run / COPY}: the weights that the run began with are missing.")
    return Weights(checkpoint.load_weights(run / COPY), str(run / COPY))


def fill(model: nn.Module, weights: Weights, outputs: int) -> str:
    """Fills a model with weights, all but a head of another size, which stays as it is; a note for the user.

    Raises UserError for whatever else does not fit.

    Args:
        outputs: how many the model has, by which its head is known.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    given = _unwrapped(weights.tensors, own)
    heads, wrong = {}, []
    for name, value in own.items():
        now, old = list(value.shape), list(given.get(name, value).shape)
        if now != old and now[:1] == [outputs] and now[1:] == old[1:]:
            heads[name] = f"{name} is new: {now} instead of {old}"
        elif now != old:
            wrong.append(f"its {name} is {old}, the model's {now}")
    wrong += [f"it lacks {name}" for name in own if name not in given and not name.endswith(COUNTER)]
    wrong += [f"the model has no {name}" for name in given if name not in own]
    if wrong:
        more = f", and {len(wrong) - 1} more like this" if len(wrong) > 1 else ""
        raise UserError(f"model.init: {weights.where} does not fit the model: {wrong[0]}{more}.")
    extra = {name: value for name, value in weights.tensors.items() if name.endswith(EXTRA)}
    fitting = {name: value for name, value in given.items() if name not in heads}
    model.load_state_dict(fitting | extra, strict=False)
    return "; ".join([f"begins with the weights of {weights.where}", *heads.values()])


EXTRA = "_extra_state"  # what a module keeps beside tensors, by get_extra_state
COUNTER = "num_batches_tracked"  # of BatchNorm, which older files lack


def _unwrapped(tensors: dict[str, Any], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in the bare model: DDP and torch.compile put a word before each."""
    found = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    for word in ("module.", "_orig_mod."):
        if found and all(name.startswith(word) and name not in own for name in found):
            found = {name.removeprefix(word): value for name, value in found.items()}
    return found


def _shown(config: Config) -> str:
    """`model.init` as it is written: a URL may hold a secret from the environment."""
    return str(to_mapping(config)["model"]["init"])


def _origin(copy: Path) -> str:
    """What a run's copy says of where its weights came from; nothing if there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(copy, "pt") as file:
            return str((file.metadata() or {}).get("init", ""))
    except (SafetensorError, OSError):
        return ""


def _download(url: str, shown: str) -> Path:
    """The file at a URL, in torch's cache, under a name of its own for each URL.

    A hash in its name, as in `resnet18-f37072fd.pth`, is checked.
    """
    name = url.partition("?")[0].rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}")
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    hashed = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        torch.hub.download_url_to_file(url, str(path), hashed[1] if hashed else None, progress=False)
    except (OSError, ValueError, RuntimeError) as error:  # no such host, no such file; no URL; another hash
        raise UserError(f"{shown} can't be fetched: {' '.join(str(error).split())}.") from None
    return path
