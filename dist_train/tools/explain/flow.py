"""Where what modules give goes: the graph that autograd has recorded, with a box for each call of a module.

What a model computes between its modules, such as the sum after a skipped block, is an operation of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dist_train.tools.trace import Call, Trace

# Operations that only look at numbers in another shape or type.
SILENT = {"view", "unsafeview", "reshapealias", "permute", "transpose", "t", "unbind", "expand", "alias",
          "clone", "tocopy", "slice", "select", "unsqueeze", "squeeze", "split",
          "splitwithsizes"}  # fmt: skip
WORDS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "mm": "matrix product", "bmm": "matrix product",
         "addmm": "matrix product", "maxpool2dwithindices": "max pool", "upsamplenearest2d": "upsample",
         "scaleddotproductflashattentionforcpu": "attention", "scaleddotproductflashattention": "attention",
         "scaleddotproductefficientattention": "attention"}  # fmt: skip
WEIGHT = "accumulategrad"  # what takes the gradient of a weight


@dataclass(eq=False)
class Vertex:
    """A call of a module, an operation between modules, the inputs, or the loss."""

    title: str
    call: Call | None = None  # None of an operation and of the inputs
    row: int = 0  # the longest way to it from what has nothing before it


@dataclass(frozen=True)
class Flow:
    """The vertices, modules in the order of their calls, and the pairs of them that follow each other."""

    vertices: list[Vertex] = field(default_factory=list)
    edges: list[tuple[Vertex, Vertex]] = field(default_factory=list)

    @property
    def modules(self) -> list[Call]:
        """The calls of modules."""
        return [vertex.call for vertex in self.vertices if vertex.call and vertex.call.module]


def flow(trace: Trace, depth: int) -> Flow:
    """The graph of the last part that a trace has followed.

    Args:
        depth: calls inside of so many others are boxes, and with all that is inside of them.
    """
    outer = {call.outer for call in trace.calls}
    boxes = {
        call: Vertex(call.name or "the model", call)
        for call in trace.calls
        if call.depth == depth or (call.depth < depth and call not in outer)
    }
    loss = Vertex(trace.loss.name, trace.loss)
    given = Vertex("the batch")
    begins = {node for call in trace.calls if call.outer is None for node in call.nodes}
    operations: dict[Any, Vertex] = {}
    edges: dict[tuple[Vertex, Vertex], None] = {}

    def vertex_of(node: Any) -> Vertex | None:
        """Who made a node; None where it is to be looked for further back."""
        if node in begins:
            return given
        if _name(node) == WEIGHT:
            return None
        call = trace.owners.get(node)
        while call is not None and call not in boxes:
            call = call.outer
        if call is not None:
            return boxes[call]
        name = _name(node)
        if name in SILENT:
            return None
        return operations.setdefault(node, Vertex(WORDS.get(name, name)))

    waiting = [(vertex, node) for call, vertex in boxes.items() for node in call.nodes]
    waiting += [(loss, node) for node in trace.loss.nodes]
    edges |= {(given, vertex): None for call, vertex in boxes.items() if call.takes_batch}
    seen = set(waiting)
    while waiting:
        target, node = waiting.pop()
        source = vertex_of(node)
        if source is not None:
            edges[source, target] = None
        if source is None or (source.call is None and source is not given):
            further = [(source or target, before) for before, _ in node.next_functions if before is not None]
            waiting += [pair for pair in further if pair not in seen]
            seen |= set(further)
    vertices = [given, *boxes.values(), *operations.values(), loss]
    _into_rows(vertices, list(edges))
    return Flow(vertices, list(edges))


def _name(node: Any) -> str:
    return str(node.name()).split("::")[-1].rstrip("0123456789").removesuffix("Backward").lower()


def _into_rows(vertices: list[Vertex], edges: list[tuple[Vertex, Vertex]]) -> None:
    """Puts each vertex below all that come before it; one without any just above what follows it."""
    for _ in vertices:  # as many times as the longest way is long, at most
        moved = False
        for before, after in edges:
            if after.row <= before.row:
                after.row, moved = before.row + 1, True
        if not moved:
            break
    begun = {after for _, after in edges}
    for vertex in vertices[1:]:
        following = [after.row for before, after in edges if before is vertex]
        if vertex not in begun and following:
            vertex.row = max(0, min(following) - 1)
