"""The sections of the configuration: one dataclass each, one documented field per key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_train.config.options import OBJECT, option


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
        "fashion_mnist, image_folder, csv, arrays, image_masks, text, shards, a class of "
        "torchvision.datasets, or `package.module:object`.",
    )
    root: str | None = option(None, "Folder of the data set; of shards also a URL.", may_change=True)
    args: dict[str, Any] = option({}, "Further arguments of the source; checked against its signature.")
    train_transform: list[Any] | None = option(
        None,
        "Transforms of a training image, random ones among them: names of torchvision.transforms.v2, "
        "`Name: {argument: value}`, or `package.module:object`. ColorJitter, RandomErasing, MixUp and CutMix "
        "at the end are done to whole batches on the device (images.md). null: the same as eval_transform.",
    )
    eval_transform: list[Any] = option([], "Transforms of an image in evaluation and prediction.")
    mean: list[float] = option([], "Mean of each channel (of values from 0 to 1), subtracted; empty: none.")
    std: list[float] = option([], "Standard deviation of each channel, divided by; empty: none.")
    target_transform: str | None = option(
        None, "What is done to each label: `one_hot`, or `package.module:object`."
    )
    eval_fraction: float = option(
        0.0,
        "Share of the training set to hold out for evaluation, for data without an eval set.",
        least=0,
        below=1,
    )
    cache: str = option(
        "none",
        "Decode image files once. disk: into data.cache_dir; memory: into memory that all processes of a "
        "machine share (images.md).",
        choices=("none", "memory", "disk"),
        may_change=True,
    )
    cache_size: int | None = option(
        None,
        "Make images smaller, to so many pixels on the shorter side; with or without a cache this is another "
        "data set. null: as they are.",
        least=1,
        most_from_file=10_000,
    )
    cache_dir: str | None = option(
        None, "Folder of caches on disk; null: ~/.cache/dist_train.", may_change=True
    )
    shuffle: bool = option(True, "A new order in each epoch; false: always the order of the files.")
    on_bad_sample: str = option(
        "stop",
        "What happens to an image that can't be read. skip: another one takes its place in training, "
        "evaluation leaves it out, and bad_samples.jsonl lists it.",
        choices=("stop", "skip"),
        may_change=True,
    )
    download_dir: str | None = option(
        None,
        "Folder on this machine for the shards that are fetched from a URL, shared by all its processes; "
        "null: one of yours among the temporary files.",
        may_change=True,
    )
    download_gb: float = option(
        20.0,
        "So many GB it may hold; what was not used for longest is deleted first.",
        least=0,
        most_from_file=1000,
        may_change=True,
    )
    drop_last: bool = option(False, "Leave out the last, short global batch of each epoch.")
    workers: int | None = option(
        None,
        "Threads per rank that make batches, or processes where data or transforms need them (images.md); "
        "null: this rank's share of the CPUs; for data in memory none, or one thread where the training "
        "leaves a CPU of this share alone.",
        least=0,
        most_from_file=256,
        may_change=True,
    )
    prefetch: int = option(
        4,
        "Micro-batches that each worker prepares in advance; of data in memory, pieces of about 4 MB.",
        least=1,
        most_from_file=1024,
        may_change=True,
    )
    pin_memory: bool | None = option(
        None, "Page-locked batches; null: where the device is a GPU.", may_change=True
    )


@dataclass
class ModelConfig:
    """Which network is trained."""

    name: str = option(
        "mlp",
        "mlp, cnn, resnet18_small, unet, gpt, a classifier or segmentation model of torchvision.models, "
        "timm/NAME, or `package.module:object`.",
    )
    args: dict[str, Any] = option({}, "Further arguments of the model; checked against its signature.")
    sync_batchnorm: bool = option(
        False,
        "BatchNorm normalizes by the whole global batch, not by its part of it; each part then needs a "
        "process of its own (parallel.md).",
    )
    init: str = option(
        "",
        "Weights to begin with: a run's folder (the evaluated weights of its best checkpoint), a .pt or "
        ".safetensors file, or a URL; a head of another size is made new. Empty: those of the seed.",
    )
    freeze: list[str] = option(
        [],
        "Which layers or weights are not trained, by names such as `layer1` or `blocks.*`; a later `!name` "
        "takes back, as in `['*', '!fc']`. Their BatchNorm stays in evaluation mode (finetuning.md).",
    )
    freeze_until: int | str | None = option(
        None, "Freeze them up to here only: `500` (optimizer steps) or `2 epochs`; null: to the end."
    )


@dataclass
class TaskConfig:
    """What the model learns: loss and metrics."""

    name: str = option(
        "classification", "classification, segmentation, language, or `package.module:object`."
    )
    args: dict[str, Any] = option({}, "Arguments of the task, such as label_smoothing.")
    teacher: str | None = option(
        None,
        "A run's folder, or a checkpoint, whose model teaches this one (recipes.md); on resume the path may "
        "change, its weights may not.",
        may_change=True,
    )
    teacher_weight: float = option(
        0.5, "Share of the loss that is distance to the teacher; the rest is the task's own.", least=0
    )
    temperature: float = option(
        1.0, "Scores of teacher and student are divided by it before they are compared.", least=1
    )


@dataclass
class OptimConfig:
    """How weights follow gradients."""

    name: str = option(
        "SGD",
        "A class of torch.optim, timm/NAME for one of timm's, such as timm/lamb or timm/lion, or "
        "`package.module:object`; Muon is ours and takes any model.",
    )
    lr: float = option(1e-3, "Peak learning rate.", least=0)
    args: dict[str, Any] = option({}, "Further arguments, such as momentum or weight_decay; checked.")
    no_decay: list[str] = option(
        [],
        "Weights without weight decay: `norms`, `biases`, `embeddings`, or patterns of names as in "
        "optim.groups.",
    )
    groups: list[Any] = option(
        [],
        "Weights with options of their own: `{match: pattern, lr: x0.1, weight_decay: 0}`, and whatever else "
        "the optimizer takes. The pattern, or one of a list of them, is the name of a weight or of a module "
        "that holds it, `*` any text in it; the first match counts. x0.1 is a tenth of optim.lr.",
    )
    layer_decay: float = option(
        1.0,
        "Each layer has so many times the rate of the layer after it, as 0.75. timm's models know their "
        "layers; else they are the items of lists and what stands beside these (optimizers.md).",
        least=0,
    )


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: str = option(
        "constant",
        "Shape of the learning rate after the warm-up.",
        choices=("constant", "linear", "cosine", "one_cycle", "step", "wsd", "plateau", OBJECT),
    )
    warmup: int | str = option(0, "Linear warm-up before it: `500` (optimizer steps) or `2 epochs`.")
    args: dict[str, Any] = option(
        {},
        "Arguments of the schedule, such as final (share of the peak); checked. Lengths and moments may be "
        "written as `500 steps` or `2 epochs`.",
    )


@dataclass
class TrainConfig:
    """How long and in which batches."""

    batch_size: int = option(
        64, "Global batch: samples per optimizer step over all ranks.", least=1, most_from_file=2**20
    )
    epochs: int | None = option(None, "Length in epochs; give this or train.steps.", least=1, may_change=True)
    steps: int | None = option(
        None, "Length in optimizer steps; give this or train.epochs.", least=1, may_change=True
    )
    accumulate: int = option(
        1,
        "Parts of a step that each rank of a new run computes, one after the other.",
        least=1,
        most_from_file=2**16,
        may_change=True,
    )
    parts: int | None = option(
        None,
        "Parts that each global batch is cut into: all numbers of processes that can share them evenly give "
        "the same bits. null: as many as the run began with, processes x train.accumulate.",
        least=1,
        most_from_file=2**16,
        may_change=True,
    )
    same_bits: bool = option(
        True,
        "Add up gradients in one order, whatever the number of processes; false: as DDP does, with other "
        "bits on each number of processes.",
        may_change=True,
    )
    stop_when: str = option(
        "",
        "The run is complete before its end: `eval/loss not better for 5 evaluations`, `max eval/accuracy "
        "not better by 0.001 for 3 evaluations`, `eval/accuracy above 0.9`, or several with commas.",
        may_change=True,
    )
    clip_norm: float = option(0.0, "Largest norm of the gradient; 0: no clipping.", least=0)
    clip_value: float = option(
        0.0, "Largest number in the gradient, after clipping its norm; 0: no clipping.", least=0
    )
    ema: float = option(
        0.0, "Decay of the moving average of weights used in evaluation; 0: none.", least=0, below=1
    )


@dataclass
class ParallelConfig:
    """How a model is spread over several processes: see docs/parallel.md."""

    name: str = option(
        "ddp",
        "ddp: each process holds the whole model; fsdp: each one holds a share of each weight, of its "
        "gradient and of the optimizer's state (FSDP2).",
        choices=("ddp", "fsdp"),
    )
    wrap: list[str] = option(
        [],
        "fsdp: which parts of the model are gathered, computed and freed one at a time, by names such as "
        "`blocks.*`; empty: each child of its Sequentials and ModuleLists.",
    )
    gather: str = option(
        "fp32",
        "fsdp: as what weights are gathered; bf16, with precision=bf16, takes half of the memory and of the "
        "traffic, and gives other bits than ddp.",
        choices=("fp32", "bf16"),
    )
    recompute: bool | str = option(
        False,
        "Keep only the inputs of some parts of the model, and compute the rest again in the backward pass: "
        "less memory, the same bits. Names such as `blocks.*`, with commas in between; true: the parts of "
        "parallel.wrap.",
    )
    offload: bool = option(False, "fsdp: keep weights and the optimizer's state in the CPU's memory.")
    mesh: list[int] = option(
        [], "fsdp: `[replicas, shards]`, whose product is the number of processes; empty: one replica."
    )


@dataclass
class EvalConfig:
    """When and in which batches the eval set is measured."""

    every: int | str = option("1 epoch", "`500` (steps), `2 epochs` or `never`; always at the end.")
    batch_size: int | None = option(
        None, "Samples per rank and batch; null: 4 micro-batches.", least=1, most_from_file=2**20
    )


@dataclass
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every: int | str = option(
        "1 epoch",
        "`500` (steps), `2 epochs`, `10 minutes`, several of them with commas, `never`, or `auto`: as "
        "often as is best for what a save costs and how often the run was interrupted.",
    )
    sharded: bool = option(
        False,
        "Each process writes its part, into one folder that all of them share; for states that rank 0 can't "
        "hold. false: rank 0 writes one file.",
    )
    keep: int = option(2, "How many of the newest checkpoints are kept; the best is kept besides.", least=1)
    best: str = option(
        "",
        "Metric that tells the best, as `max eval/accuracy`; empty: the task's own; `none`: no best.",
    )


@dataclass
class LogConfig:
    """How often a row of metrics is written."""

    every: int = option(50, "Optimizer steps between two rows.", least=1)
    batches: bool = option(
        False, "Record which samples each step read and a checksum of what the model got; slow."
    )
    histograms: bool = option(
        False, "Record a histogram of each weight at each evaluation, in histograms.jsonl and W&B."
    )


@dataclass
class WandbConfig:
    """The mirror of the metrics in Weights & Biases."""

    mode: str = option(
        "auto",
        "auto: online with an API key, else offline.",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str = option("dist_train", "Project.")
    entity: str | None = option(None, "Team or user.")
    group: str | None = option(None, "Group of runs.")
    job_type: str | None = option(
        None, "Kind of run within its group, by which W&B averages over seeds; null: train."
    )
    name: str | None = option(None, "Name shown; null: run.name.")
    tags: list[str] = option([], "Tags.")
    notes: str | None = option(None, "Notes.")
    tables: str = option(
        "end",
        "When a classification shows the accuracy of each class and the confusion matrix.",
        choices=("never", "end", "evaluations"),
    )
    images: int = option(
        0,
        "So many eval samples in a table, too, with what is said of them: images leave this machine.",
        least=0,
    )
    alert: bool = option(True, "Alert by mail or Slack, as W&B's settings say, when the run fails.")
    checkpoint: bool = option(False, "Upload the best checkpoint of the complete run, as an artifact.")
    code: bool = option(
        False,
        "Upload the program: Python and YAML files of the current folder that git doesn't ignore, git's "
        "commit and remote, the packages installed. They leave this machine (wandb.md).",
    )
    console: bool = option(False, "Upload what the program prints.")
