"""All keys of the configuration: those of its sections (sections.py), and those that belong to none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.options import Rule, option, section
from dist_train.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
    WandbConfig,
)


@dataclass
class Config:
    """All of a run that is not its step and its tensors."""

    run: RunConfig = section(RunConfig, may_change=True)
    seed: int = option(
        0, "Seed of the order, augmentation, initial weights and dropout.", least=0, below=2**63
    )
    device: str = option(
        "auto",
        "auto: CUDA, then MPS, then CPU.",
        choices=("auto", "cpu", "cuda", "mps"),
        may_change=True,
    )
    precision: str = option(
        "fp32",
        "Arithmetic; bf16 and fp16 by autocast, weights stay fp32.",
        choices=("fp32", "tf32", "bf16", "fp16"),
    )
    compile: bool = option(False, "Compile the model by torch.compile.", may_change=True)
    compile_args: dict[str, Any] = option(
        {}, "Arguments of torch.compile, such as mode or options; checked.", may_change=True
    )
    channels_last: bool = option(False, "Keep images and convolutions in NHWC order.", may_change=True)
    deterministic: bool = option(
        False, "Use deterministic kernels only; the CPU's are so anyway.", may_change=True
    )
    threads: int | None = option(
        None,
        "CPU threads per rank; null: the allowed CPUs, shared by the local ranks.",
        least=1,
        most_from_file=4096,
        may_change=True,
    )
    timeout_seconds: int = option(
        600, "How long a rank waits for the others before it gives up.", least=1, may_change=True
    )
    stop_after: str | None = option(
        None,
        "Stop like a signal does, this long after the start: `3h50m` or `90 s`; null: before SLURM's time "
        "limit, if there is one.",
        may_change=True,
    )
    watchdog_seconds: int = option(
        480,
        "No step for so long: the stacks of all threads are written, and the rank fails; 0: never.",
        least=0,
        may_change=True,
    )
    on_nonfinite: str = option(
        "stop",
        "What happens when a loss or gradient is not finite. skip: the step changes nothing, on any rank; "
        "costs a wait for the device in each step.",
        choices=("stop", "skip"),
        may_change=True,
    )
    max_skips: int = option(
        10, "How many steps in a row may be skipped before the run stops.", least=1, may_change=True
    )
    resume: str = option(
        "auto",
        "auto: go on from the run's newest checkpoint; never: refuse if the run exists; "
        "or a checkpoint of another run to start from.",
        may_change=True,
    )
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    task: TaskConfig = section(TaskConfig)
    optim: OptimConfig = section(OptimConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    train: TrainConfig = section(TrainConfig)
    parallel: ParallelConfig = section(ParallelConfig, may_change=True)
    eval: EvalConfig = section(EvalConfig, may_change=True)
    checkpoint: CheckpointConfig = section(CheckpointConfig, may_change=True)
    log: LogConfig = section(LogConfig, may_change=True)
    wandb: WandbConfig = section(WandbConfig, may_change=True)
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
    return [key for key, _, _ in each_key(Config())]


def each_key(section: Any, prefix: str = "", may_change: bool = False) -> Iterator[tuple[str, Rule, Any]]:
    """(full key, what holds for it, value) of every key, sections within sections."""
    for item in fields(section):
        value, rule = getattr(section, item.name), item.metadata["rule"]
        rule = replace(rule, may_change=may_change or rule.may_change)
        if is_dataclass(value):
            yield from each_key(value, f"{prefix}{item.name}.", rule.may_change)
        else:
            yield f"{prefix}{item.name}", rule, value
