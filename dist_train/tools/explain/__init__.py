"""Explain: one batch on its way through a network, to the loss and back, for who meets autograd first.

batch.py    the batch, what modules give, the gradients, one step
flow.py     which modules' outputs go where, as autograd has recorded it
show.py     tables
layout.py   where boxes and lines of a picture stand
picture.py  the network with the path of the gradient
"""

from __future__ import annotations

from dist_train.tools.explain.batch import Explained, explain
from dist_train.tools.explain.picture import draw
from dist_train.tools.explain.show import show

__all__ = ["Explained", "draw", "explain", "show"]
