"""Where the boxes of a network stand, and how lines get from one to another."""

from __future__ import annotations

import math
from typing import NamedTuple

from dist_train.tools.explain.flow import Flow, Vertex

WIDTH, HEIGHT = 4.6, 0.5  # of a box, inches
ROUND, ROUND_WIDTH = 0.26, 1.3  # of what is no module
GAP = 0.34  # between rows
ASIDE = 0.5  # between boxes that stand side by side
LANE = 0.3  # between ways around boxes
COLUMN = 9.0  # inches, after which a network goes on in another column, where it can be cut


class Box(NamedTuple):
    """Where a vertex is drawn: its middle, and its size."""

    x: float
    y: float
    width: float
    height: float
    column: int

    @property
    def top(self) -> float:
        """The upper edge."""
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.y - self.height / 2

    @property
    def left(self) -> float:
        """The left edge."""
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        """The right edge."""
        return self.x + self.width / 2


Pair = tuple[Vertex, Vertex]
Way = list[tuple[float, float]]  # its corners


def places(flow: Flow, around: dict[Pair, int]) -> dict[Vertex, Box]:
    """Rows from top to bottom, in several columns where that would be too high."""
    rows: dict[int, list[Vertex]] = {}
    for vertex in flow.vertices:
        rows.setdefault(vertex.row, []).append(vertex)
    boxes: dict[Vertex, Box] = {}
    left = 0.0
    for column, numbers in enumerate(_columns(flow, rows)):
        widest = max(len(rows[number]) for number in numbers) * (WIDTH + ASIDE) - ASIDE
        aside = LANE * max((around.get(pair, 0) for pair in flow.edges if pair[1].row in numbers), default=0)
        x = left + aside + widest / 2
        y = 0.0
        for number in numbers:
            height = max(map(_height, rows[number]))
            order = sorted(rows[number], key=lambda vertex: _pull(flow, vertex, boxes))
            for place, vertex in enumerate(order):
                shift = (place - (len(order) - 1) / 2) * (WIDTH + ASIDE)
                width = WIDTH if vertex.call else ROUND_WIDTH
                boxes[vertex] = Box(x + shift, y - height / 2, width, _height(vertex), column)
            y -= height + GAP
        left = x + widest / 2 + aside + 2 * ASIDE
    return boxes


def _columns(flow: Flow, rows: dict[int, list[Vertex]]) -> list[list[int]]:
    """The rows of each column: one ends where all that goes on comes from its last vertex."""
    columns: list[list[int]] = [[]]
    height = 0.0
    for number in sorted(rows):
        crossing = {before for before, after in flow.edges if before.row < number <= after.row}
        can_cut = len(crossing) == 1 and crossing == set(rows[number - 1])
        if height > COLUMN and can_cut and max(rows) - number > 3:
            columns.append([])
            height = 0.0
        columns[-1].append(number)
        height += max(map(_height, rows[number])) + GAP
    return columns


def _height(vertex: Vertex) -> float:
    return HEIGHT if vertex.call else ROUND


def _pull(flow: Flow, vertex: Vertex, places: dict[Vertex, Box]) -> float:
    """The mean place of what comes before a vertex."""
    found = [places[before].x for before, after in flow.edges if after is vertex and before in places]
    return sum(found) / len(found) if found else -math.inf


def lanes(flow: Flow) -> dict[Pair, int]:
    """Of what goes around other rows the lane: the first one from 1 that is free there."""
    found: dict[Pair, int] = {}
    for pair in sorted(flow.edges, key=lambda pair: pair[1].row - pair[0].row):
        if pair[1].row - pair[0].row > 1:
            beside = [other for other in found if other[0].row < pair[1].row and pair[0].row < other[1].row]
            taken = {found[other] for other in beside}
            found[pair] = next(lane for lane in range(1, len(taken) + 2) if lane not in taken)
    return found


def sides(boxes: dict[Vertex, Box], around: dict[Pair, int]) -> tuple[float, float]:
    """How far all reaches to the left and to the right."""
    most = LANE * max(around.values(), default=0)
    return min(box.left for box in boxes.values()) - most, max(box.right for box in boxes.values()) + most


def path(pair: Pair, boxes: dict[Vertex, Box], lane: int | None, shift: float) -> Way:
    """The corners of a way down, `shift` beside its middle."""
    before, after = boxes[pair[0]], boxes[pair[1]]
    begin, end = (before.x + shift, before.bottom), (after.x + shift, after.top)
    under, over = before.bottom - GAP / 2 + shift / 2, after.top + GAP / 2 + shift / 2
    if before.column != after.column:  # up between the columns, and to the top or the side of the box
        left = min(box.left for box in boxes.values() if box.column == after.column)
        x = left - LANE * (lane or 0) - ASIDE - shift
        way = [begin, (begin[0], under), (x, under)]
        if lane is None:
            return [*way, (x, over - shift), (end[0], over - shift), end]
        return [*way, (x, after.y - shift / 2), (after.left, after.y - shift / 2)]
    if lane is None:
        return (
            [begin, (begin[0], under), (end[0], under), end]
            if abs(before.x - after.x) > 0.01
            else [begin, end]
        )
    between = [box for vertex, box in boxes.items() if pair[0].row <= vertex.row <= pair[1].row]
    between = [box for box in between if box.column == after.column]
    if before.x > after.x + 0.01:  # around on the right
        x = max(box.right for box in between) + LANE * lane + shift / 2
        return [(before.right, before.y + shift / 2), (x, before.y + shift / 2), (x, after.y - shift / 2),
                (after.right, after.y - shift / 2)]  # fmt: skip
    x = min(box.left for box in between) - LANE * lane + shift / 2
    return [(before.left, before.y - shift / 2), (x, before.y - shift / 2), (x, after.y + shift / 2),
            (after.left, after.y + shift / 2)]  # fmt: skip
