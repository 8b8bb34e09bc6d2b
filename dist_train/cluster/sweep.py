"""Sweeps: a file in W&B's own sweep format, expanded here into numbered tasks; no server takes part.

`wandb sweep FILE` takes the same file. A task is a function of the file and its number, so each task of a
job array, and each attempt of it, computes its own; a random sample is keyed by the configuration's seed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf

from dist_train.config import UserError, is_override, load_words, nearest
from dist_train.seeds import key

FILE_KEYS = (
    "apiVersion", "command", "controller", "description", "early_terminate", "entity", "image_uri", "job",
    "kind", "method", "metric", "metrics", "name", "parameters", "program", "project", "run_cap", "scheduler",
)  # fmt: skip
# What a parameter needs in each distribution; those with `min` and `max` are bounded by them.
KINDS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "inv_log_uniform": ("min", "max"),
    "inv_log_uniform_values": ("min", "max"),
    "normal": (),
    "log_normal": (),
    "beta": (),
}
QUANTIZED = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")
KINDS |= {f"q_{kind}": KINDS[kind] for kind in QUANTIZED}
# What may be given besides, and what it is otherwise.
DEFAULTS = {
    "normal": {"mu": 0.0, "sigma": 1.0},
    "log_normal": {"mu": 0.0, "sigma": 1.0},
    "beta": {"a": 1.0, "b": 1.0},
}


@dataclass(frozen=True)
class Task:
    """One run of a sweep."""

    file: Path
    sweep: str
    number: int
    words: tuple[str, ...]  # config files and overrides that all tasks share
    overrides: tuple[str, ...]  # KEY=VALUE of this task's parameters

    @property
    def arguments(self) -> list[str]:
        """The arguments of `dist-train train`, config files first."""
        named = [f"run.name={self.sweep}-{self.number}", f"wandb.group={self.sweep}"]
        setting = [word for word in self.overrides if not word.startswith("seed=")]
        if setting and setting != list(self.overrides):  # W&B takes the seeds of a setting together by it
            named.append(f"wandb.job_type={text(' '.join(setting))}")
        last: dict[str, str] = {}
        for word in filter(is_override, [*self.words, *self.overrides, *named]):
            key = word.partition("=")[0]
            if f"~{key}" in last:
                last.pop(key, None)  # to stand behind it
            last[key] = word
        return [*(word for word in self.words if not is_override(word)), *last.values()]

    def check(self) -> None:
        """Raises UserError if the configuration refuses this task."""
        try:
            load_words(self.arguments)
        except UserError as error:
            raise UserError(f"{self.file}: task {self.number}: {error}") from None


def expand(file: Path, arguments: Sequence[str] = ()) -> list[Task]:
    """The tasks of a sweep file, not checked yet; `arguments` come after those of its `command`.

    Raises UserError for what is wrong with the file.
    """
    content = _read(file)
    words = (*_words(content, file), *arguments)
    parameters = {name: _complete(spec, name, file) for name, spec in _flat(content["parameters"], file)}
    cap = content.get("run_cap")
    if content["method"] == "grid":
        choices = [_grid(spec, name, file) for name, spec in parameters.items()]
        found: Iterator[tuple[Any, ...]] = itertools.islice(itertools.product(*choices), cap)
    elif cap is None:
        raise UserError(f"{file}: 'run_cap' is missing: the number of samples that method: random draws.")
    else:
        seed = _seed(words, file)
        found = (
            tuple(draw(spec, Random(key(seed, f"sweep {name}", number))) for name, spec in parameters.items())
            for number in range(cap)
        )
    name = str(content.get("name") or file.stem)
    return [
        Task(
            file,
            name,
            number,
            words,
            tuple(f"{k}={text(v)}" for k, v in zip(parameters, values, strict=True)),
        )
        for number, values in enumerate(found)
    ]


def pick(tasks: Sequence[Task], number: int) -> Task:
    """Task `number`, checked. Raises UserError if there is none, or the configuration refuses it."""
    if not 0 <= number < len(tasks):
        raise UserError(
            f"{tasks[0].file}: there is no task {number}; they are numbered 0 to {len(tasks) - 1}."
        )
    tasks[number].check()
    return tasks[number]


def draw(spec: Mapping[str, Any], source: Random) -> Any:
    """A value of a parameter with all its keys, such as {distribution: uniform, min: 0.1, max: 0.2}."""
    kind = spec["distribution"]
    low: Any = spec.get("min")
    high: Any = spec.get("max")
    if kind == "constant":
        return spec["value"]
    if kind.startswith("categorical"):
        return source.choices(spec["values"], spec.get("probabilities"))[0]
    if kind == "int_uniform":
        return source.randint(low, high)
    match kind.removeprefix("q_"):
        case "uniform":
            value = source.uniform(low, high)
        case "log_uniform":  # the bounds are exponents
            value = math.exp(source.uniform(low, high))
        case "inv_log_uniform":
            value = math.exp(-source.uniform(low, high))
        case "log_uniform_values" | "inv_log_uniform_values":  # 1/x is log-uniform where x is
            value = math.exp(source.uniform(math.log(low), math.log(high)))
        case "normal":
            value = source.normalvariate(spec["mu"], spec["sigma"])
        case "log_normal":
            value = source.lognormvariate(spec["mu"], spec["sigma"])
        case _:
            value = source.betavariate(spec["a"], spec["b"])
    return _rounded(round(value / spec["q"]) * spec["q"] if kind.startswith("q_") else value)


def text(value: Any) -> str:
    """How a value is written after `KEY=`, so that the configuration reads the same value."""
    if isinstance(value, str):
        try:
            plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"]), resolve=False)
            if plain == {"x": value} and value.isprintable():
                return value
        except Exception:  # as YAML it is nothing at all
            pass
    return json.dumps(value, default=str, ensure_ascii=False)  # which YAML reads too


def _rounded(value: float) -> float:
    """A number that one can say: nobody needs the other ten digits."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _seed(words: Sequence[str], file: Path) -> int:
    try:  # the run's name and the length of its training may come from elsewhere
        return load_words([*words, "run.name=seed", "train.steps=1", "train.epochs=null"]).seed
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


# --- reading -------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    """The file as W&B reads it: with PyYAML, for which `1e-4` is text."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: the sweep file can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{file}: not valid YAML: {reason}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a sweep file holds `key: value` lines, this one holds a list or text.")
    for name in content:
        if name not in FILE_KEYS:
            raise UserError(f"{file}: a sweep has no key '{name}'{nearest(str(name), FILE_KEYS)}.")
    if content.get("method") not in ("grid", "random"):
        raise UserError(
            f"{file}: 'method' must be grid or random, not {content.get('method')!r};"
            " others need W&B's server: `wandb sweep` and `wandb agent`."
        )
    cap = content.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise UserError(f"{file}: 'run_cap' must be a whole number of at least 1, not {cap!r}.")
    if not isinstance(content.get("parameters"), dict) or not content["parameters"]:
        raise UserError(
            f"{file}: 'parameters' must hold what is varied, as `optim.lr: {{values: [0.1, 0.2]}}`."
        )
    return content


def _words(content: dict[str, Any], file: Path) -> list[str]:
    """Config files and overrides in `command`: what follows `train`, but for W&B's ${...}."""
    command = [str(word) for word in content.get("command") or []]
    if command and not {"train", "${args_no_hyphens}"} <= set(command):
        raise UserError(
            f"{file}: 'command' must be like [dist-train, train, CONFIG, '${{args_no_hyphens}}'],"
            " so that W&B's agent and SLURM's tasks train the same."
        )
    after = command[command.index("train") + 1 :] if command else []
    return [word for word in after if not word.startswith("${")]


def _flat(
    parameters: Mapping[str, Any], file: Path, prefix: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(full key, what W&B's format says of it) of each parameter, sections within sections."""
    for name, spec in parameters.items():
        full = f"{prefix}{name}"
        if not isinstance(spec, dict) or not spec:
            raise UserError(f"{file}: '{full}' must be like {{values: [0.1, 0.2]}}, not {spec!r}.")
        if isinstance(spec.get("parameters"), dict):
            yield from _flat(spec["parameters"], file, f"{full}.")
        else:
            yield full, spec


def _complete(spec: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    """`spec` with its distribution and all defaults. Raises UserError for what W&B's format forbids."""

    def refuse(why: str) -> NoReturn:
        raise UserError(f"{file}: '{name}' {why}.")

    kind = spec.get("distribution") or _kind(spec)
    if not kind:
        refuse("needs value, values, or min and max; both as whole numbers, or both like 1.0")
    if kind not in KINDS:
        refuse(f"has an unknown distribution {kind!r}{nearest(str(kind), KINDS)}")
    defaults = {**DEFAULTS.get(kind.removeprefix("q_"), {}), **({"q": 1.0} if kind.startswith("q_") else {})}
    known = ["distribution", *KINDS[kind], *defaults]
    for item in spec:
        if item not in known:
            refuse(f"can't have '{item}' as {kind}{nearest(str(item), known)}")
    for item in KINDS[kind]:
        if item not in spec:
            refuse(f"needs '{item}' as {kind}")
    for item in ("min", "max", *defaults):
        value = spec.get(item, 0)
        if isinstance(value, bool) or not isinstance(value, int if kind == "int_uniform" else (int, float)):
            hint = "; W&B's YAML takes 1e-4 for text, 1.0e-4 for a number" if isinstance(value, str) else ""
            refuse(f"has no {'whole ' if kind == 'int_uniform' else ''}number as '{item}': {value!r}{hint}")
    for item in ("values", "probabilities"):
        if item in spec and not (isinstance(spec[item], list) and spec[item]):
            refuse(f"needs a list as '{item}'")
    if "probabilities" in spec and len(spec["probabilities"]) != len(spec["values"]):
        refuse("needs one of 'probabilities' for each of 'values'")
    if "min" in spec and (spec["min"] > spec["max"] or (kind.endswith("_values") and spec["min"] <= 0)):
        refuse(f"can't lie between {spec['min']} and {spec['max']} as {kind}")
    if spec.get("q", 1) <= 0:
        refuse("needs a 'q' above 0")
    return {"distribution": kind, **defaults, **spec}


def _kind(spec: dict[str, Any]) -> str:
    """The distribution that W&B takes where none is named; empty if it can't tell."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    bounds = {type(spec.get("min")), type(spec.get("max"))}
    return "int_uniform" if bounds == {int} else "uniform" if bounds == {float} else ""


def _grid(spec: dict[str, Any], name: str, file: Path) -> list[Any]:
    """All values of a parameter, as W&B's grid has them."""
    match spec["distribution"]:
        case "constant":
            return [spec["value"]]
        case "categorical":
            return spec["values"]
        case "int_uniform":
            return list(range(spec["min"], spec["max"] + 1))
        case "q_uniform":  # `max` itself is left out
            count = math.ceil((spec["max"] - spec["min"]) / spec["q"])
            return [_rounded(spec["min"] + number * spec["q"]) for number in range(count)]
    raise UserError(
        f"{file}: '{name}' has endless values as {spec['distribution']}; method: grid needs 'values'."
    )
