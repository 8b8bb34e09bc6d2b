"""What a page is made of. Every function returns HTML, in which all that it was given is escaped.

A page is one file: styles, scripts, numbers and pictures lie in it, and it may fetch nothing. Curves are
drawn by uPlot (vendor/, MIT licence).
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

HERE = Path(__file__).parent
# The browser itself refuses whatever would be fetched.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


LONG = 40  # characters of a cell that may be broken into lines


class Html(str):
    """Text that is HTML already; all other text is escaped."""


class Curve(NamedTuple):
    """One curve of a chart."""

    name: str  # in the legend; curves of one name have one entry and one color
    x: ArrayLike  # [N], rising
    y: ArrayLike  # [N]; NaN leaves a gap
    part: str = ""  # which one of its name it is, as `seed 3`


def page(title: str, *sections: str, lead: str = "") -> str:
    """A whole page, with `lead` below its title; light or dark as the reader's system is, or by a button."""
    style = _read("vendor/uPlot.min.css") + _read("page.css")
    made = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header><button id="theme" title="light or dark" aria-label="light or dark"></button>
<h1>{escape(title)}</h1><p>{escape(lead)}</p><nav></nav></header>
<main>{"".join(map(escape, sections))}</main>
<script>{_read("vendor/uPlot.iife.min.js")}</script>
<script>{_read("page.js")}</script>
</body>
</html>
"""
    return made.encode(errors="backslashreplace").decode()  # a file's name may be no text


def section(heading: str, *parts: str) -> Html:
    """Parts under a heading, to which the top of the page links."""
    return Html(f"<section><h2>{escape(heading)}</h2>{''.join(map(escape, parts))}</section>")


def grid(*parts: str) -> Html:
    """Parts beside each other, where there is room."""
    return Html(f'<div class="grid">{"".join(map(escape, parts))}</div>')


def text(*paragraphs: str) -> Html:
    """Paragraphs."""
    return Html("".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs))


def warning(sentence: str) -> Html:
    """A sentence that must not be passed over."""
    return Html(f'<p class="warning">{escape(sentence)}</p>')


def folded(title: str, code: str) -> Html:
    """A long text with its own lines, such as a configuration, below a title that opens it."""
    return Html(f"<details><summary>{escape(title)}</summary><pre>{escape(code)}</pre></details>")


def tiles(values: Iterable[tuple[str, Any]]) -> Html:
    """The few figures that matter most, as (name, value)."""
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd></div>" for name, value in values)
    return Html(f'<dl class="tiles">{"".join(cells)}</dl>')


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Html:
    """A table that a click on its head sorts; numbers are rounded to four digits, None is a dash."""
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    inside = f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return Html(f'<div class="wide">{inside}</div>')


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Iterable[Curve | tuple[str, ArrayLike, ArrayLike]],
    markers: Iterable[tuple[float, str]] = (),
    smooth: float = 0.0,
) -> Html:
    """Curves: hover for values, drag to zoom, double click for all, click a name to hide it.

    Args:
        x_label: `time` for seconds, which are shown as hours, minutes and seconds.
        series: curves, or (name, x, y).
        markers: (x, text) of vertical lines.
        smooth: weight of what came before in the moving average that is drawn, below 1; the reader can
            change it.
    """
    arrays: dict[bytes, int] = {}  # curves of the same x share it
    curves = []
    for curve in (Curve(*item) for item in series):
        x = np.asarray(curve.x, "<f8").tobytes()
        y = np.asarray(curve.y, "<f4").tobytes()
        number = arrays.setdefault(x, len(arrays))
        curves.append({"name": curve.name, "part": curve.part, "x": number, "y": _base64(y)})
    labels = {"x_label": x_label, "y_label": y_label, "smooth": smooth}
    lines = [{"x": x, "text": text} for x, text in markers]
    spec = {**labels, "x": [_base64(x) for x in arrays], "curves": curves, "markers": lines}
    data = json.dumps(spec).replace("<", "\\u003c")  # nothing in it ends the script
    return Html(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<script type="application/json">{data}</script></figure>'
    )


def bars(title: str, values: Iterable[tuple[str, float]], most: float | None = None) -> Html:
    """A bar for each (name, value); a bar of the whole width is `most`, or the greatest value."""
    items = list(values)
    whole = most or max((value for _, value in items), default=0) or 1
    lines = "".join(
        f"<span>{escape(name)}</span>"
        f'<i style="--part:{min(max(value / whole, 0), 1):.4f}"></i><b>{escape(shown(value))}</b>'
        for name, value in items
    )
    return Html(f'<figure><figcaption>{escape(title)}</figcaption><div class="bars">{lines}</div></figure>')


def figure(title: str, png: bytes, caption: str = "") -> Html:
    """A picture, given as the bytes of a PNG file."""
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{_base64(png)}">'
    note = f"<p>{escape(caption)}</p>" if caption else ""
    return Html(f"<figure><figcaption>{escape(title)}</figcaption>{image}{note}</figure>")


def escape(part: str) -> str:
    """Text as HTML that shows it."""
    return part if isinstance(part, Html) else html.escape(str(part))


def shown(value: Any) -> str:
    """A value as people read it: 12,345 and 0.8312; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, (bool, str)):
        return value if isinstance(value, str) else str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if isinstance(value, float) and 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number" data-value="{value!r}">{escape(shown(value))}</td>'
    long = (
        ' class="long"'
        if isinstance(value, str) and len(value) > LONG and not isinstance(value, Html)
        else ""
    )
    return f"<td{long}>{escape(shown(value))}</td>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
