"""The network as a picture: modules as boxes, data flows down in blue, the gradient back up in red."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from dist_train.checkpoint.files import write_output
from dist_train.tools.explain.batch import Explained
from dist_train.tools.explain.flow import Vertex
from dist_train.tools.explain.layout import GAP, WIDTH, Box, Pair, lanes, path, places, sides
from dist_train.tools.trace import Call

MIDDLE, LAST = 2.0, 3.45  # where the columns of a box begin
MARGIN = 0.3
HEADING, LEAST = 0.95, 6.0  # inches: the height of the heading, and the least width
LONGEST = 26  # letters of a name

FORWARD, BACKWARD, PALE_FORWARD, PALE_BACKWARD = "#1f5fa8", "#c0392b", "#e8f0fa", "#fbeae8"


def draw(explained: Explained, output: Path) -> None:
    """Draws the network to a PNG file. Raises UserError if that can't be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flow = explained.flow
    around = lanes(flow)
    boxes = places(flow, around)
    left, right = sides(boxes, around)
    bottom = min(box.bottom for box in boxes.values()) - GAP - MARGIN / 2
    size = (max(LEAST, right - left + 2 * MARGIN), HEADING - bottom)
    figure = plt.figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(left - MARGIN, left - MARGIN + size[0])
    axis.set_ylim(bottom, HEADING)
    axis.axis("off")
    _heading(axis, left, explained)
    for pair in flow.edges:
        _edge(axis, pair, boxes, around.get(pair))
    weights = _weight_gradients(explained)
    for vertex, box in boxes.items():
        _vertex(axis, vertex, box, explained, weights.get(vertex))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    write_output(output, drawn.getvalue())


def _heading(axis: Any, x: float, explained: Explained) -> None:
    lines = (
        (0.75, 12, "black", f"{explained.model}: {explained.inputs}"),
        (0.5, 8, FORWARD, "↓ forward: the shape of what a module gives, mean ± deviation"),
        (
            0.3,
            8,
            BACKWARD,
            "↑ backward: the norm of the loss's gradient ∇ by that, and by the module's weights",
        ),
    )
    for y, size, color, text in lines:
        axis.text(x, y, text, fontsize=size, color=color, va="center", parse_math=False)


def _edge(axis: Any, pair: Pair, boxes: dict[Vertex, Box], lane: int | None) -> None:
    """Two arrows between boxes: down, and back up."""
    for color, shift in ((FORWARD, -0.07), (BACKWARD, 0.07)):
        way = path(pair, boxes, lane, shift)
        if color == BACKWARD:
            way.reverse()
        axis.plot(*zip(*way[:-1], strict=True), color=color, linewidth=1.1, zorder=1)
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", xy=way[-1], xytext=way[-2], arrowprops=arrow, zorder=1)


def _vertex(axis: Any, vertex: Vertex, box: Box, explained: Explained, weights: float | None) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    corners = "round,pad=0,rounding_size=0.06"
    outline: dict[str, Any] = {"facecolor": "white", "edgecolor": "#444444", "zorder": 2}
    axis.add_patch(FancyBboxPatch((box.left, box.bottom), box.width, box.height, corners, **outline))
    if vertex.call is None:
        axis.text(
            box.x, box.y, vertex.title, fontsize=8, ha="center", va="center", zorder=4, parse_math=False
        )
        return
    for begin, end, color in ((MIDDLE, LAST, PALE_FORWARD), (LAST, WIDTH, PALE_BACKWARD)):
        place, width = (box.left + begin, box.bottom + 0.02), end - begin - 0.02
        axis.add_patch(Rectangle(place, width, box.height - 0.04, facecolor=color, zorder=3))
    cells = _loss_cells(explained) if vertex.call.module is None else _cells(vertex.call, weights)
    title = vertex.title if len(vertex.title) <= LONGEST else f"…{vertex.title[1 - LONGEST :]}"
    for column, color, pair in (
        (0, "black", (title, vertex.call.kind)),
        (MIDDLE, FORWARD, cells[:2]),
        (LAST, BACKWARD, cells[2:]),
    ):
        for text, y, size in zip(pair, (0.1, -0.11), (8.5, 7.5), strict=True):
            weight = "bold" if text is title else "normal"
            axis.text(box.left + column + 0.07, box.y + y, text, fontsize=size, color=color, weight=weight,
                      va="center", zorder=4, parse_math=False)  # fmt: skip


def _cells(call: Call, weights: float | None) -> list[str]:
    """What a box says of the forward and of the backward pass, in two lines each."""
    cells = ["", ""]
    if numbers := call.statistics:
        cells = [str(list(numbers.shape)), f"{numbers.mean:.2g} ± {numbers.std:.2g}"]
    gradient = "" if call.gradient is None else f"∇ {call.gradient:.2g}"
    return [*cells, gradient, "" if weights is None else f"weights {weights:.2g}"]


def _loss_cells(explained: Explained) -> list[str]:
    return [f"{explained.loss:.5g}", f"{explained.after:.5g} after a step", "∇ begins here", ""]


def _weight_gradients(explained: Explained) -> dict[Vertex, float]:
    """Of each box the norm of the gradient by all weights inside."""
    found: dict[Vertex, float] = {}
    for vertex in explained.flow.vertices:
        if vertex.call is not None and vertex.call.module is not None:
            prefix = f"{vertex.call.name}." if vertex.call.name else ""
            norms = [p.gradient for p in explained.parameters if p.name.startswith(prefix)]
            if trained := [norm for norm in norms if norm is not None]:
                found[vertex] = math.hypot(*trained)
    return found
