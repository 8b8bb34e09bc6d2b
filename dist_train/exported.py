"""Files that were exported from a run: what they say of themselves, and how they are run.

A file of safetensors holds weights, of which the model is built again. One of torch.export or ONNX is a
program: it computes in fp32, on the CPU here, and any other program can run it without dist_train.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.checkpoint import Damaged, extra_state
from dist_train.config import UserError

SUFFIXES = {"safetensors": ".safetensors", "torch.export": ".pt2", "onnx": ".onnx"}
NOTES = "dist_train.json"  # in an archive of torch.export: what the other two keep as their metadata

Run = Callable[[torch.Tensor], torch.Tensor]


def is_exported(place: str | Path) -> bool:
    """Whether this is the name of an exported file; a run's folder may be called as one."""
    return Path(place).suffix in SUFFIXES.values() and not Path(place).is_dir()


def read(path: Path) -> dict[str, Any]:
    """What an exported file has of what a checkpoint holds, and its `program`, or the weights as `model`.

    Raises UserError for what `dist-train export` has not written.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    reader = {".safetensors": _safetensors, ".pt2": _torch_export, ".onnx": _onnx}[path.suffix]
    try:
        notes, held = reader(path)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes each library raise
        raise Damaged(f"{path}: can't be read as {path.suffix}: {_first_line(error)}") from None
    try:
        config, classes, shape = (json.loads(notes[key]) for key in ("config", "classes", "input_shape"))
        inside, parts = notes["preprocessing"] == "inside", int(notes["parts"])
        named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        shaped = isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape)
        if not (isinstance(config, dict) and named and shaped and parts > 0):
            raise ValueError
    except (LookupError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{path}: doesn't say what its images and classes are, as files of `dist-train export` do; give"
            " the run's folder, or export it anew."
        ) from None
    if inside and isinstance(config.get("data"), dict):  # then the program does it
        config["data"] |= {"mean": [], "std": []}
    any_size = notes.get("resizing") == "inside"
    if any_size:  # one by one, since images of several sizes make no batch
        for section, values in (("data", {"eval_transform": []}), ("eval", {"batch_size": 1})):
            if isinstance(config.get(section), dict):
                config[section] |= values
    saved = {"config": config, "classes": classes, "sample_shape": shape, "parts": parts, "average": None}
    return saved | {"inside": inside, "any_size": any_size} | held


def _safetensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = file.metadata() or {}
        return notes, {"model": weights | extra_state(notes)}


def _torch_export(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    notes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(f"/{NOTES}") and archive.getinfo(name).file_size < 2**24:
                notes = json.loads(archive.read(name))

    def load() -> Run:
        module = torch.export.load(path).module()
        return lambda inputs: module(inputs)  # no submodule, which could be moved, or be in training

    return notes, {"program": load}


def _onnx(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"{path}: needs onnxruntime: pip install 'dist-train[onnx]'.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])

    return session.get_modelmeta().custom_metadata_map, {"program": lambda: run}


class Program(nn.Module):
    """An exported program as a model: float images `[B, C, H, W]` in, scores out, as its run's model has it.

    Where preprocessing is inside it is given values from 0 to 1, of which it makes bytes again, and the
    logarithms of its probabilities are the scores.

    Raises UserError, unless `trust`, for one of torch.export, since torch loads it with pickle.
    """

    def __init__(self, path: Path, saved: dict[str, Any], trust: bool) -> None:
        super().__init__()
        if path.suffix == ".pt2" and not trust:
            raise UserError(
                f"{path}: torch may run code when it loads a .pt2 file; if you trust the file: --trust"
                " (trust=True)."
            )
        try:
            self.run: Run = saved["program"]()
        except Exception as error:  # whatever a damaged file makes torch raise
            raise Damaged(f"{path}: can't be loaded by torch.export: {_first_line(error)}") from None
        self.inside: bool = saved["inside"]

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The scores for inputs on any device, on the same device."""
        given = inputs.cpu().contiguous()
        if self.inside:
            given = (given * 255).round().to(torch.uint8)
        with torch.autocast("cpu", enabled=False):
            outputs = self.run(given)
        if self.inside:
            outputs = outputs.clamp_min(torch.finfo(torch.float32).tiny).log()
        return outputs.to(inputs.device)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
