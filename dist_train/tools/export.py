"""`dist-train export`: a trained model as one file for other programs, checked against the model itself.

The file is written, read again as `predict` and `eval` do it, and run on samples of the eval set. It gets its
name only if it computes what the model computes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from dist_train import __version__, checkpoint, data
from dist_train.checkpoint.files import sync_folder
from dist_train.config import Config, RunError, UserError, completed, nearest, only
from dist_train.data.normalize import Normalization
from dist_train.data.order import Part
from dist_train.exported import NOTES, SUFFIXES
from dist_train.predict import EVALUATED, check_classes, evaluated
from dist_train.tools.served import Probabilities, Resized, Scores, resized
from dist_train.train import Given
from dist_train.trained import contents, trained

MOST = 1e-5  # that outputs may be off by, of the largest where that is above 1
CHECKED = 64  # samples of the eval set


@dataclass(frozen=True)
class Exported:
    """What was written, and what it takes and gives."""

    path: Path
    input: str
    output: str
    difference: float  # the largest to the model's outputs, of the largest of these where that is above 1
    samples: int  # on which that was measured


def export(
    place: str | Path,
    kind: str,
    out: Path | None = None,
    *,
    preprocess: bool = False,
    resize: bool = False,
    overrides: Sequence[str] = (),
    given: Given | None = None,
    trust: bool = False,
) -> Exported:
    """Writes the model of a run, its moving average where there is one, to a new file.

    Args:
        place: a run's folder (its best checkpoint, else its newest), or a checkpoint.
        kind: safetensors, torch.export or onnx.
        out: the file; by default one in the current folder that is called as the run.
        preprocess: whether the program takes bytes, uint8 `[B, C, H, W]` as data.eval_transform leaves them,
            and gives probabilities; else it takes normalized float32 and gives the model's scores.
        resize: whether it takes bytes of any size, does what data.eval_transform does, too, and gives
            probabilities.
        overrides: `key=value` changes, such as data.root.
        given: used instead of what the configuration names, as in `fit`.
        trust: whether the file may name any object, as `overrides` may.

    Raises UserError for what can't be exported so, and RunError where the file computes something else.
    """
    target, given, preprocess = _target(place, kind, out), given or Given(), preprocess or resize
    if preprocess and kind == "safetensors":
        raise UserError("--preprocess: a file of safetensors holds weights, and does nothing to images.")
    path, saved = contents(place)
    if "program" in saved:
        raise UserError(f"{place}: is a program already; give the run's folder.")
    objects = {"model": given.model, "task": given.task, "data": given.eval_data}
    config = evaluated(path, saved, [*overrides, "device=cpu"], objects, trust)
    model = trained(path, saved, config, given.model, trust)
    inputs, are_images = _samples(config, saved, given, resize)
    if preprocess:
        _check_bytes(inputs, are_images)
    normalize = Normalization(tuple(config.data.mean), tuple(config.data.std))
    geometry = resized(config.data.eval_transform) if resize else None
    normalized = inputs
    if are_images:
        normalized = [normalize(geometry(one * 255).div(255) if geometry else one) for one in inputs]
    if preprocess:
        served: nn.Module = Probabilities(model, normalize.mean, normalize.std, geometry)
    else:
        served, inputs = Scores(model), normalized
    example = torch.zeros(2, *inputs[0].shape[1:], dtype=torch.uint8 if preprocess else inputs[0].dtype)
    notes = _notes(saved, kind, preprocess, example)
    if resize:
        notes |= {"input": f"uint8 [B, {example.shape[1]}, H, W]", "resizing": "inside"}
    with _new(target) as part:
        with _refused(kind):
            WRITERS[kind](model if kind == "safetensors" else served, example, part, notes)
        again = trained(part, contents(part)[1], config, given.model, trust=True)
        difference = _difference((model, normalized), (again, inputs), preprocess)
        if not difference <= MOST:
            raise RunError(
                f"{target} is not written: on samples of the eval set its outputs are off by"
                f" {difference:.2g}, more than the {MOST:g} of rounding; give another --to."
            )
    return Exported(target, notes["input"], notes["output"], difference, sum(map(len, inputs)))


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """A file to write to, which gets its name at the end; nothing is left of it where that fails.

    Raises UserError if there is a file of this name by then, or none can be written.
    """
    part = target.with_name(f"part-{os.getpid()}-{target.name}")
    try:
        yield part
        _name(part, target)
        sync_folder(target.absolute().parent)
    except FileExistsError:
        raise _exists(target) from None
    except OSError as error:
        raise UserError(f"--out: {target} can't be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)


def _target(place: str | Path, kind: str, out: Path | None) -> Path:
    """The file to be written. Raises UserError if it exists, or is called as another kind is."""
    if kind not in SUFFIXES:
        near = nearest(kind, SUFFIXES)
        raise UserError(f"--to: can't be '{kind}'; choose one of {', '.join(SUFFIXES)}{near}.")
    if kind == "onnx" and not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        raise UserError("--to: onnx needs more packages: pip install 'dist-train[onnx]'.")
    place = Path(place).absolute()
    is_file = place.suffix in (".pt", ".sharded", ".safetensors")
    out = out or Path(f"{place.stem if is_file else place.name}{SUFFIXES[kind]}")
    if out.suffix != SUFFIXES[kind]:
        raise UserError(f"--out: a file of {kind} ends with {SUFFIXES[kind]}, not '{out.suffix}'.")
    if out.exists():
        raise _exists(out)
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"--out: {out} can't be written: {out.absolute().parent} is no folder to write to.")
    return out


def _exists(out: Path) -> UserError:
    return UserError(f"--out: {out} exists already; give the name of a new file.")


def _name(part: Path, target: Path) -> None:
    """Gives a file its name. Raises FileExistsError if that has come to be another's meanwhile."""
    try:
        os.link(part, target)  # unlike a rename it takes no other file's place
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        part.rename(target)


def _samples(
    config: Config, saved: dict[str, Any], given: Given, as_they_are: bool
) -> tuple[list[torch.Tensor], bool]:
    """Inputs from all over the eval set, images not normalized yet; and whether they are images.

    They come as one `[1, ...]` and all others `[N, ...]`, since a program that knows one size only would
    fail; or `as_they_are`, without transforms, each `[1, C, H, W]`. Raises UserError where a sample is more
    than one tensor.
    """
    options = replace(config.data, mean=[], std=[])
    config = replace(config, data=replace(options, eval_transform=[]) if as_they_are else options)
    first = given.train_data if given.eval_data is None else given.eval_data
    sets = data.build(config, *data.opened(config, first, given.eval_data))
    check_classes(sets, saved)
    count = min(CHECKED, len(sets.eval))
    places = np.linspace(0, len(sets.eval) - 1, count).astype(int)
    if sets.eval.source.groups() is not None:  # such as shards, which are mixed already, and read as a whole
        places = np.arange(count)
    groups = np.split(places, range(1, count)) if as_they_are else [places]
    parts = [Part(0, 0, group, len(group), len(group)) for group in groups]
    found = [batch.to(torch.device("cpu")).inputs for batch in sets.eval.batches(parts)]
    if not isinstance(found[0], torch.Tensor):
        raise UserError("data: a sample has several inputs; only models of one tensor [B, ...] are exported.")
    if not as_they_are:
        found = [some for some in (found[0][:1], found[0][1:]) if len(some)]
    return found, sets.eval.transform is not None


def _check_bytes(inputs: list[torch.Tensor], are_images: bool) -> None:
    """Raises UserError unless the inputs were images of 8 bits."""
    if not are_images or not all(torch.equal((some * 255).round() * (1 / 255), some) for some in inputs):
        raise UserError("--preprocess: takes images of 8 bits, and these inputs are none; leave it out.")


def _notes(saved: dict[str, Any], kind: str, inside: bool, example: torch.Tensor) -> dict[str, str]:
    """What a file tells about itself: texts by name."""
    config = completed(saved["config"])
    options, sizes = config["data"], [*map(str, example.shape[1:])]
    if _is_text(example):
        sizes[0] = f"T <= {sizes[0]}"
    return {
        "dist_train": __version__,
        "run": str(config["run"]["name"]),
        "step": str(saved.get("step", "")),
        "model": str(config["model"]["name"]),
        "task": str(config["task"]["name"]),
        "classes": json.dumps(saved["classes"]),
        "input": f"{str(example.dtype).removeprefix('torch.')} [{', '.join(['B', *sizes])}]",
        "input_shape": json.dumps(saved["sample_shape"]),
        "output": "probabilities" if inside else "scores",
        "preprocessing": "inside" if inside else "outside",
        "mean": json.dumps(options["mean"]),
        "std": json.dumps(options["std"]),
        "transforms": json.dumps(options["eval_transform"]),
        "parts": str(saved["parts"]),
        # What is needed to evaluate it; a program needs no model by name.
        "config": json.dumps(
            only(config, [key for key in EVALUATED if key != "model." or kind == "safetensors"])
        ),
    }


def _is_text(example: torch.Tensor) -> bool:
    """Whether it is symbols `[B, T]`, of which fewer are a sample, too."""
    return example.ndim == 2 and not example.is_floating_point()


Batches = tuple[nn.Module, list[torch.Tensor]]  # a model, and what it is given


def _difference(one: Batches, other: Batches, probabilities: bool) -> float:
    """How far outputs are apart that two models give, each for its batches; of the largest if above 1."""
    outputs = []
    for model, inputs in (one, other):
        with torch.no_grad():
            given = torch.cat([Scores(model)(some) for some in inputs])
        outputs.append(given.softmax(1) if probabilities else given)
    expected, found = outputs
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1))


# --- the formats -----------------------------------------------------------------------------------------


@contextmanager
def _refused(kind: str) -> Iterator[None]:
    """Within it what torch can't do with a model is a UserError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a model of any kind may make it raise anything
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"--to: the model can't be exported to {kind}: {reason}.") from error


def _write_weights(model: nn.Module, example: torch.Tensor, path: Path, notes: dict[str, str]) -> None:
    if lost := checkpoint.save_weights(path, model.state_dict(), notes):
        raise ValueError(f"what it keeps as {lost[0]} is more than plain values")


def _write_torch(model: nn.Module, example: torch.Tensor, path: Path, notes: dict[str, str]) -> None:
    torch.export.save(_traced(model, example), path, extra_files={NOTES: json.dumps(notes)})


def _write_onnx(model: nn.Module, example: torch.Tensor, path: Path, notes: dict[str, str]) -> None:
    program = torch.onnx.export(
        _traced(model, example),
        input_names=["inputs"],
        output_names=[notes["output"]],
        dynamic_shapes=({axis: dim.__name__ for axis, dim in _dims(model, example).items()},),  # their names
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(notes)
    program.save(path)


WRITERS = {"safetensors": _write_weights, "torch.export": _write_torch, "onnx": _write_onnx}


def _traced(model: nn.Module, example: torch.Tensor) -> ExportedProgram:
    """The program of a model for any number of samples."""
    return torch.export.export(
        model.eval(), (example,), dynamic_shapes=(_dims(model, example),), strict=False
    )


def _dims(model: nn.Module, example: torch.Tensor) -> dict[int, Any]:
    """Which axes have any length: that of samples, of texts that of symbols, up to the example's, and those
    of images that are resized.
    """
    further = {1: Dim("length", min=1, max=example.shape[1])} if _is_text(example) else {}
    if isinstance(getattr(model, "resized", None), Resized):
        further = {2: Dim("height", min=2), 3: Dim("width", min=2)}
    return {0: Dim("batch", min=1)} | further
