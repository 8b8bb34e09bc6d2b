"""One batch through a network, as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dist_train.config import counted, printable
from dist_train.tools.explain.batch import Explained
from dist_train.tools.trace import Statistics


def show(explained: Explained) -> None:
    """Prints the way of the batch: what modules give, the loss, the gradients, and the step."""
    console = Console(width=120)  # not the terminal's: piped output is not cut
    print(f"the batch: {counted(explained.samples, 'sample')}, {explained.inputs}")
    print(f"\nforward: from top to bottom, what each module of {printable(explained.model)} gives\n")
    console.print(_forward(explained), markup=False)
    print(f"\nthe loss: {explained.loss:.6g}, the mean over the batch{_guess(explained)}")
    print("\nbackward: from the loss back, the gradient of the loss by each parameter\n")
    console.print(_backward(explained), markup=False)
    rate = f"{explained.rate:.4g}"
    print(
        f"\nthe step: {explained.optimizer}, at a rate of {rate}, moves each parameter against its gradient;"
    )
    print(f"the loss of the same batch is {explained.after:.6g} then")


def _guess(explained: Explained) -> str:
    if explained.guess is None:
        return ""
    return f" (who gives all classes the same probability has {explained.guess:.6g})"


def _forward(explained: Explained) -> Table:
    table = _table("module", "type", numbers=("shape", "mean", "std", "min", "max", "zeros", "gradient norm"))
    for call in explained.flow.modules:
        numbers = call.statistics or Statistics()
        values = (numbers.mean, numbers.std, numbers.low, numbers.high)
        row = [" x ".join(map(str, numbers.shape)), *(f"{value:.3g}" for value in values)]
        row.append(f"{numbers.zeros / max(1, numbers.count):.0%}")
        row.append("" if call.gradient is None else f"{call.gradient:.3g}")
        table.add_row(printable(call.name or "the model"), call.kind, *row)
    return table


def _backward(explained: Explained) -> Table:
    table = _table("parameter", numbers=("shape", "norm", "gradient norm"))
    for parameter in reversed(explained.parameters):
        gradient = "frozen" if parameter.gradient is None else f"{parameter.gradient:.3g}"
        shape = " x ".join(map(str, parameter.shape))
        table.add_row(printable(parameter.name), shape, f"{parameter.norm:.3g}", gradient)
    return table


def _table(*texts: str, numbers: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
