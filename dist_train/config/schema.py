"""The keys of the configuration: one dataclass per section, one documented field per key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


def option(default: Any, doc: str, choices: Sequence[str] = ()) -> Any:
    """A configuration field with its documentation and, where they are few, its allowed values."""
    metadata = {"doc": doc, "choices": tuple(choices)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """Where the run lies: in the folder `run.dir`/`run.name`."""

    dir: str = option("runs", "Folder that holds the runs.")
    name: str = option("", "Name of the run's folder; empty: the name of the first config file.")


@dataclass
class DataConfig:
    """What is read, and what is done to each image."""

    name: str = option(
        "fashion_mnist",
        "fashion_mnist, image_folder, csv, arrays, a class of torchvision.datasets, or "
        "`package.module:object`.",
    )
    root: str | None = option(None, "Folder of the data set.")
    args: dict[str, Any] = option({}, "Further arguments of the source; checked against its signature.")
    train_transform: list[Any] | None = option(
        None,
        "Transforms of a training image, random ones among them: names of torchvision.transforms.v2, "
        "`Name: {argument: value}`, or `package.module:object`. null: the same as eval_transform.",
    )
    eval_transform: list[Any] = option([], "Transforms of an image in evaluation and prediction.")
    mean: list[float] = option([], "Mean of each channel (of values from 0 to 1), subtracted; empty: none.")
    std: list[float] = option([], "Standard deviation of each channel, divided by; empty: none.")
    target_transform: str | None = option(
        None, "What is done to each label: `one_hot`, or `package.module:object`."
    )
    eval_fraction: float = option(
        0.0, "Share of the training set to hold out for evaluation, for data without an eval set."
    )
    shuffle: bool = option(True, "A new order in each epoch; false: always the order of the files.")
    on_bad_sample: str = option(
        "stop",
        "What happens to an image that can't be read. skip: another one takes its place in training, "
        "evaluation leaves it out, and bad_samples.jsonl lists it.",
        ("stop", "skip"),
    )
    drop_last: bool = option(False, "Leave out the last, short global batch of each epoch.")
    workers: int | None = option(
        None,
        "Loader processes per rank; null: none for data in memory, else this rank's share of the CPUs.",
    )
    prefetch: int = option(4, "Micro-batches that each worker prepares in advance.")
    pin_memory: bool | None = option(None, "Page-locked batches; null: where the device is a GPU.")


@dataclass
class ModelConfig:
    """Which network is trained."""

    name: str = option(
        "mlp",
        "mlp, cnn, a classifier of torchvision.models, timm/NAME, or `package.module:object`.",
    )
    args: dict[str, Any] = option({}, "Further arguments of the model; checked against its signature.")


@dataclass
class TaskConfig:
    """What the model learns: loss and metrics."""

    name: str = option("classification", "classification, or `package.module:object`.")
    args: dict[str, Any] = option({}, "Arguments of the task, such as label_smoothing.")


@dataclass
class OptimConfig:
    """How weights follow gradients."""

    name: str = option("SGD", "A class of torch.optim, or `package.module:object`.")
    lr: float = option(1e-3, "Peak learning rate.")
    args: dict[str, Any] = option({}, "Further arguments, such as momentum or weight_decay; checked.")


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: str = option(
        "constant",
        "Shape of the learning rate after the warm-up.",
        ("constant", "linear", "cosine", "one_cycle", "step"),
    )
    warmup: int | str = option(0, "Linear warm-up before it: `500` (optimizer steps) or `2 epochs`.")
    args: dict[str, Any] = option(
        {}, "Arguments of the schedule, such as final (share of the peak); checked."
    )


@dataclass
class TrainConfig:
    """How long and in which batches."""

    batch_size: int = option(64, "Global batch: samples per optimizer step over all ranks.")
    epochs: int | None = option(None, "Length in epochs; give this or train.steps.")
    steps: int | None = option(None, "Length in optimizer steps; give this or train.epochs.")
    accumulate: int = option(1, "Micro-batches per optimizer step on each rank.")
    clip_norm: float = option(0.0, "Largest norm of the gradient; 0: no clipping.")
    ema: float = option(0.0, "Decay of the moving average of weights used in evaluation; 0: none.")


@dataclass
class EvalConfig:
    """When and in which batches the eval set is measured."""

    every: int | str = option("1 epoch", "`500` (steps), `2 epochs` or `never`; always at the end.")
    batch_size: int | None = option(None, "Samples per rank and batch; null: 4 micro-batches.")


@dataclass
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every: int | str = option(
        "1 epoch",
        "`500` (steps), `2 epochs`, `10 minutes`, several of them with commas, `never`, or `auto`: as "
        "often as is best for what a save costs and how often the run was interrupted.",
    )
    keep: int = option(2, "How many of the newest checkpoints are kept; the best is kept besides.")
    best: str = option(
        "",
        "Metric that tells the best, as `max eval/accuracy`; empty: the task's own; `none`: no best.",
    )


@dataclass
class LogConfig:
    """How often a row of metrics is written."""

    every: int = option(50, "Optimizer steps between two rows.")
    batches: bool = option(
        False, "Record which samples each step read and a checksum of what the model got; slow."
    )


@dataclass
class WandbConfig:
    """The mirror of the metrics in Weights & Biases."""

    mode: str = option(
        "auto",
        "auto: online with an API key, else offline.",
        ("auto", "online", "offline", "disabled"),
    )
    project: str = option("dist_train", "Project.")
    entity: str | None = option(None, "Team or user.")
    group: str | None = option(None, "Group of runs.")
    name: str | None = option(None, "Name shown; null: run.name.")
    tags: list[str] = option([], "Tags.")
    notes: str | None = option(None, "Notes.")


@dataclass
class Config:
    """All of a run that is not its step and its tensors."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = option(0, "Seed of the order, augmentation, initial weights and dropout.")
    device: str = option("auto", "auto: CUDA, then MPS, then CPU.", ("auto", "cpu", "cuda", "mps"))
    precision: str = option(
        "fp32",
        "Arithmetic; bf16 and fp16 by autocast, weights stay fp32.",
        ("fp32", "tf32", "bf16", "fp16"),
    )
    compile: bool = option(False, "Compile the model by torch.compile.")
    channels_last: bool = option(False, "Keep images and convolutions in NHWC order.")
    deterministic: bool = option(False, "Use deterministic kernels only; the CPU's are so anyway.")
    threads: int | None = option(
        None, "CPU threads per rank; null: the allowed CPUs, shared by the local ranks."
    )
    timeout_seconds: int = option(600, "How long a rank waits for the others before it gives up.")
    stop_after: str | None = option(
        None,
        "Stop like a signal does, this long after the start: `3h50m` or `90 s`; null: before SLURM's time "
        "limit, if there is one.",
    )
    watchdog_seconds: int = option(
        480, "No step for so long: the stacks of all threads are written, and the rank fails; 0: never."
    )
    on_nonfinite: str = option(
        "stop",
        "What happens when a loss or gradient is not finite. skip: the step changes nothing, on any rank; "
        "costs a wait for the device in each step.",
        ("stop", "skip"),
    )
    max_skips: int = option(10, "How many steps in a row may be skipped before the run stops.")
    resume: str = option(
        "auto",
        "auto: go on from the run's newest checkpoint; never: refuse if the run exists; "
        "or a checkpoint of another run to start from.",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    # What is written at each place that a resolver such as oc.env gave its value, and that value
    # (interpolation.py). No key, so no field, but dataclasses.replace hands it on.
    if TYPE_CHECKING:
        written: dict[tuple[Any, ...], tuple[str, Any]] = field(default_factory=dict)
    else:
        written: InitVar = None

    def __post_init__(self, written: Any) -> None:  # type: ignore[override]
        self.written = written or {}

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.run.dir) / self.run.name


def get(config: Config, key: str) -> Any:
    """The value of a full key such as `train.batch_size`."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def all_keys() -> list[str]:
    """Every full key, in the order of the dataclasses."""
    return [key for key, _, _ in each_field(Config())]


def each_field(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(full key, field, value) of every key, sections within sections."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from each_field(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, value


@dataclass(frozen=True)
class Every:
    """An interval such as `500`, `2 epochs, 10 minutes` or `never`: whichever comes first is due."""

    steps: int = 0
    epochs: int = 0
    seconds: float = 0.0
    auto: bool = False

    @classmethod
    def parse(cls, text: int | str) -> Every:
        """Raises ValueError with the grammar for what is no interval."""
        units = {
            "": "steps",
            "step": "steps",
            "epoch": "epochs",
            "second": "seconds",
            "minute": "minutes",
            "hour": "hours",
        }
        scale = {"seconds": 1, "minutes": 60, "hours": 3600}
        if str(text).strip() == "auto":
            return cls(auto=True)
        found: dict[str, Any] = {}
        for part in str(text).split(","):
            match = re.fullmatch(r"\s*(?:(\d+)\s*)?([a-z]*?)s?\s*", part)
            if part.strip() in ("never", "0"):
                continue
            if not match or match[2] not in units or not (match[1] or match[2]):
                raise ValueError("is written as 500, '2 epochs', '10 minutes' or never")
            unit, count = units[match[2]], int(match[1] or 1)
            found["seconds" if unit in scale else unit] = count * scale.get(unit, 1)
        return cls(**found)

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether `step` (optimizer steps done so far) ends an interval of steps or epochs."""
        return bool(
            (self.steps and step % self.steps == 0)
            or (self.epochs and step % (self.epochs * steps_per_epoch) == 0)
        )

    def in_steps(self, steps_per_epoch: int) -> int:
        """The interval as a length in steps."""
        return self.steps + self.epochs * steps_per_epoch


def parse_seconds(text: str) -> float:
    """The seconds in `3h50m`, `90 s`, `1d` or `2 hours`. Raises ValueError with the grammar."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(d|h|m|s)[a-z]*\s*", str(text))
    total = sum(float(number) * units[unit] for number, unit in parts)
    if not total or re.sub(r"(\d+(?:\.\d+)?)\s*(d|h|m|s)[a-z]*\s*", "", str(text)):
        raise ValueError("is written as 3h50m, 45m or '90 s'")
    return total
