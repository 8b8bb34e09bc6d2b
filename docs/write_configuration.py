"""Writes docs/configuration.md from the code: python docs/write_configuration.py"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dist_train import models, optim
from dist_train.config import Config
from dist_train.config.options import Rule
from dist_train.config.schema import each_key
from dist_train.data import sources
from dist_train.optim import rates
from dist_train.tasks import TASKS

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

Written from the code by `python docs/write_configuration.py`; a test keeps it up to date.

A configuration is the defaults below, then the YAML files, then the `KEY=VALUE` arguments, from left to
right; the last one that sets a key wins. `dist-train config` prints the result without training:

```bash
dist-train config configs/quickstart.yaml optim.lr=0.1 'data.train_transform=[RandomHorizontalFlip]'
```

- Keys are written with dots on the command line (`optim.lr=0.1`) and as sections in YAML files.
- `null` empties a key, `{}` a mapping (`model.args={}`), and `~` takes away what a file set:
  `~model.args.weights` deletes the argument, `~optim.lr` gives the key its default again.
- Mappings are merged. But a later file, or the arguments, that give a section another `name` drop the
  `args` of the former name, and a line says so: `model.name=my:net` on a recipe for `resnet18` leaves no
  `weights` behind. Arguments that stand beside the new name stay; `data.root` stays, too. In the same way
  a later `train.steps` takes the place of an earlier `train.epochs`; both in one place are a mistake.
- `${...}` refers to another key: `eval.batch_size='${train.batch_size}'`. `${oc.env:NAME}` is read from the
  environment when the program starts. What is recorded or printed (`config.yaml`, checkpoints, W&B's
  configuration, `dist-train config`, changes on going on, mistakes) has it as it is written, so that no
  secret gets out. That the environment stays the same from one attempt to the next is up to you.
- A mistake is answered by one sentence that names the file or argument, the key, and often the right key.
  The exit code is 2.
- `package.module:object` is imported; the current folder is searched too.
- An interval is `500` (optimizer steps), `2 epochs`, `10 minutes` or `never`.
- The configuration is written to `config.yaml` in the run's folder. It is a configuration like
  any other: `dist-train train runs/quickstart/config.yaml run.name=again` repeats a run.

<!-- exit code: 2 -->
```bash
dist-train config configs/quickstart.yaml optim.lrate=0.1
```

<!-- printed -->
```text
dist-train: argument 'optim.lrate=0.1': there is no key 'optim.lrate' (did you mean 'optim.lr'?).
```"""

OBJECTS = """
## Objects of your own

Wherever a name is accepted, `package.module:object` is too: a class or function that is called with the
arguments of `args`, and with those of the following that its signature takes.

- `data.name`: `root`, `train` (true or false), `split` (`train` or `test`). It returns a map-style data set
  of (image, label) whose `classes` are the names of the classes, or `None` where there is no eval set. What
  else it may offer, such as the path of a sample or many samples at once, is told in
  [source.py](../dist_train/data/source.py); to a task of your own a sample may also be a dict or a longer
  tuple.
- `model.name`: `input_shape`, `in_channels`, `num_classes`. It returns a module.
- `task.name`: it returns an object with `best`, `loss` and `metrics`, as in
  [examples/regression.py](../examples/regression.py).
- `optim.name`: the weights, or groups of them where `optim.groups` and the like make some, and `lr`. It
  returns an optimizer. The schedule scales the rate of each group of weights; the `lr` of metrics.jsonl is
  that of `optim.lr`.
- `schedule.name`: `t`, the moment from 0 (the end of the warm-up) to 1 (the end of the training). It returns
  the share of the peak learning rate at this moment, a number from 0 on, and is a function of its arguments
  alone: it has no state.
- `data.train_transform`, `data.eval_transform`: a class is made with the arguments written beside its name;
  a function is the transform itself.
- `data.target_transform`: a function of the label.

Such names count where you write them: in your own files and arguments. In a checkpoint or a run's folder
they are followed with `--trust` only: see [security](security.md).

## What may change when a run goes on

A run goes on only with the configuration it was started with, except for keys that leave the meaning of the
steps done alone: those that the tables above mark by *may change*.

Other changes are refused with a sentence that lists them. The number of processes is no key, and may change.
"""


def main() -> None:
    """Writes the page; with --check only says whether it is up to date, by the exit code."""
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page in Markdown."""
    keys = list(each_key(Config()))
    lines = [INTRODUCTION, *_section("Top level", Config(), [item for item in keys if "." not in item[0]])]
    for item in fields(Config):
        section = getattr(Config(), item.name)
        if is_dataclass(section):
            ours = [key for key in keys if key[0].startswith(f"{item.name}.")]
            lines += _section(f"`{item.name}`", section, ours)
    named: list[tuple[str, dict[str, Callable[..., Any]]]] = [
        ("data.name` and `data.args", sources.SOURCES),
        ("model.name` and `model.args", models.MODELS),
        ("optim.name` and `optim.args", {"Muon": optim.Muon}),
        ("schedule.name` and `schedule.args", rates.SCHEDULES),
        ("task.name` and `task.args", TASKS),
    ]
    for title, functions in named:
        lines += ["", f"## `{title}`", "", "| name | arguments | meaning |", "| --- | --- | --- |"]
        lines += [_row(name, function) for name, function in functions.items()]
    return "\n".join(lines) + "\n" + OBJECTS


def _section(title: str, section: Any, keys: list[tuple[str, Rule, Any]]) -> Iterator[str]:
    yield from ("", f"## {title}", "", inspect.getdoc(section) or "", "")
    yield from ("| key | default | on resume | meaning |", "| --- | --- | --- | --- |")
    for key, rule, value in keys:
        may_change = "may change" if rule.may_change else ""
        yield f"| `{key}` | `{_yaml(value)}` | {may_change} | {' '.join([rule.doc, *_limits(rule)])} |"


def _limits(rule: Rule) -> Iterator[str]:
    """The values that a key may have, in sentences."""
    if rule.choices:
        yield f"One of {', '.join(f'`{choice}`' for choice in rule.choices)}."
    if rule.least is not None:
        yield f"At least {_number(rule.least)}."
    if rule.below is not None:
        yield f"Below {_number(rule.below)}."
    if rule.most_from_file is not None:
        yield f"In a file from elsewhere at most {_number(rule.most_from_file)}."


def _number(value: float) -> str:
    """`4,096`, or a great power of two as `2**63`."""
    power = int(value).bit_length() - 1
    return f"2**{power}" if power > 20 and value == 2**power else f"{value:,}"


def _row(name: str, function: Callable[..., Any]) -> str:
    """A function by its own arguments; those that the program gives are left out."""
    given = (
        "root",
        "train",
        "input_shape",
        "in_channels",
        "num_classes",
        "matrices",
        "lr",
        "t",
        "values",
        "sign",
    )
    arguments = [
        f"`{p.name}`" if p.default is p.empty else f"`{p.name}: {_yaml(p.default)}`"
        for p in inspect.signature(function).parameters.values()
        if p.name not in given
    ]
    meaning = (inspect.getdoc(function) or "").split("\n\nArgs:")[0].replace("\n", " ").replace("|", "\\|")
    return f"| `{name}` | {', '.join(arguments)} | {' '.join(meaning.split())} |"


def _yaml(value: Any) -> str:
    """A default as one writes it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]"
    return '""' if value == "" else str(value)


if __name__ == "__main__":
    main()
