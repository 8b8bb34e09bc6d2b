"""Images listed in a CSV file."""

from __future__ import annotations

import csv as csv_module
import io
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.config import UserError, nearest
from dist_train.data.images import ImageFiles, near_path
from dist_train.data.labels import numbered

DELIMITERS = ",;\t|"  # one of them is found by itself
NUMBER = re.compile(r"[+-]?[0-9]+")


class Row(NamedTuple):
    """An image and its label, as they are written."""

    line: int
    image: str
    label: str


def csv(
    annotations_file: str,
    img_dir: str = "",
    root: str | None = None,
    train: bool = True,
    eval_annotations_file: str | None = None,
    eval_img_dir: str | None = None,
    classes: list[str] | None = None,
    channels: int = 3,
    image_column: str | int = 0,
    label_column: str | int = 1,
    delimiter: str | None = None,
) -> ImageFiles | None:
    """Images listed in a CSV file with a file name and a label in each row.

    `image_column` and `label_column` are names in its first row, or numbers from 0; then a header is not
    needed. Labels are whole numbers (with `classes` for their names) or names: the training file decides,
    for both. Paths are relative to `img_dir`, and that to `root`. `delimiter` is found where it is a comma,
    a semicolon, a tab or a bar.
    """
    base = Path(root or "")
    if not train and eval_annotations_file is None:
        return None
    read = partial(_rows, image_column=image_column, label_column=label_column, delimiter=delimiter)
    file, folder = base / annotations_file, base / img_dir
    rows = read(file, folder)
    names, by_number = _classes(file, rows, classes)
    if not train:
        file = base / str(eval_annotations_file)
        folder = folder if eval_img_dir is None else base / eval_img_dir
        rows = read(file, folder)
    position = {name: number for number, name in enumerate(names)}
    labels = [_label(file, row, position, by_number) for row in rows]
    paths = [folder / row.image for row in rows]
    for row, path in zip(rows, paths, strict=True):
        if not path.is_file():
            hint = ""
            if row.line == 1 and not isinstance(image_column, str):
                hint = (
                    "; if this row is a header, give data.args.image_column and label_column by their names"
                )
            raise UserError(f"{file}: line {row.line}: there is no image {path}{near_path(path)}{hint}.")
    return ImageFiles(paths, labels, names, channels)


def column(name: str, root: str | None, train: bool, args: Mapping[str, Any]) -> list[str]:
    """What each row has in another column, in the order of the samples.

    Args:
        name: the column's name in the first row, or its number from 0.
        root, train, args: as for `csv`; an eval set without a file of its own is a part of the training file.

    Raises UserError if there is no such column.
    """
    listed = None if train else args.get("eval_annotations_file")
    folders = (args.get("eval_img_dir") if listed else None, args.get("img_dir", ""))
    base, delimiter = Path(root or ""), args.get("delimiter")
    file = base / str(listed or args["annotations_file"])
    folder = base / next(item for item in folders if item is not None)
    columns = (args.get("image_column", 0), args.get("label_column", 1))
    rows, lines = _rows(file, folder, *columns, delimiter), dict(_cells(file, delimiter))
    names = [cell.strip() for cell in next(iter(lines.values()))]
    if name not in names and not name.isdecimal():
        near = nearest(name, names) or f"; its first row has {', '.join(names)}"
        raise UserError(f"--by: {file} has no column '{name}'{near}.")
    place = names.index(name) if name in names else int(name)
    return [lines[row.line][place].strip() if place < len(lines[row.line]) else "" for row in rows]


def _rows(
    file: Path, folder: Path, image_column: str | int, label_column: str | int, delimiter: str | None
) -> list[Row]:
    """The rows without their header. Raises UserError for a file that is not of this kind."""
    lines = _cells(file, delimiter)
    header = (
        lines[0][1] if lines and (isinstance(image_column, str) or isinstance(label_column, str)) else None
    )
    image = _place("image_column", image_column, header, file)
    label = _place("label_column", label_column, header, file)
    rows = []
    for line, cells in lines if header is None else lines[1:]:
        if len(cells) <= max(image, label) or not cells[label].strip():
            raise UserError(
                f"{file}: line {line} has no label; a row is `file name,label`, or as data.args.image_column,"
                " label_column and delimiter say."
            )
        # As the bytes that the file holds, whatever the locale takes the names of files to be.
        name = os.fsdecode(cells[image].strip().encode("utf-8", "surrogateescape"))
        rows.append(Row(line, name, cells[label].strip()))
        if not cells[label].isascii() and re.search("[\udc80-\udcff]", cells[label]):
            raise UserError(f"{file}: line {line}: the label is not written in UTF-8.")
    if header is None and _begins_with_header(rows, folder):
        rows = rows[1:]
    if not rows:
        raise UserError(f"{file}: lists no images.")
    return rows


def _cells(file: Path, delimiter: str | None) -> list[tuple[int, list[str]]]:
    """The number and the cells of each line that is not empty."""
    try:
        # File names may be any bytes.
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
        if "\0" in text:
            raise csv_module.Error("it holds bytes that are no text")
        if delimiter is None:
            delimiter = _sniff(text[: 2**16])
        lines = csv_module.reader(io.StringIO(text, newline=""), delimiter=delimiter.replace("\\t", "\t"))
        return [(lines.line_num, cells) for cells in lines if cells]
    except OSError as error:
        raise UserError(f"data.args: {file} can't be read: {error.strerror}{near_path(file)}.") from None
    except csv_module.Error as error:
        raise UserError(f"{file}: not a CSV file ({error}).") from None


def _sniff(text: str) -> str:
    try:
        return csv_module.Sniffer().sniff(text, DELIMITERS).delimiter
    except csv_module.Error:
        return ","


def _place(key: str, column: str | int, header: list[str] | None, file: Path) -> int:
    """The place of a column in a row, from 0."""
    if isinstance(column, int) and not isinstance(column, bool) and column >= 0:
        return column
    if not isinstance(column, str):
        raise UserError(f"data.args.{key}: is the name of a column or its number from 0, not {column!r}.")
    names = [name.strip() for name in header or []]
    if column not in names:
        near = nearest(column, names) or f"; its first row has {', '.join(names)}"
        raise UserError(f"data.args.{key}: {file} has no column '{column}'{near}.")
    return names.index(column)


def _begins_with_header(rows: Sequence[Row], folder: Path) -> bool:
    """Whether the first row can be nothing but a header: no image is there, and no other row is like it.

    What is left unclear counts as an image, so that none is passed over in silence.
    """
    if len(rows) < 2:
        return False
    first, others = rows[0], rows[1:]
    if Path(first.image).suffix or "/" in first.image or (folder / first.image).is_file():
        return False
    labels = {row.label for row in others}
    if first.label in labels or (NUMBER.fullmatch(first.label) and all(map(NUMBER.fullmatch, labels))):
        return False
    return all(Path(row.image).suffix for row in others)


def _classes(file: Path, rows: Sequence[Row], given: list[str] | None) -> tuple[list[str], bool]:
    """The names of the classes, and whether a label is the number of one, as the training file has it."""
    names = [str(name) for name in given or []]
    labels = {row.label for row in rows}
    by_number = all(map(NUMBER.fullmatch, labels)) and not labels <= set(names)
    if not names:
        names = numbered(map(int, labels), str(file)) if by_number else sorted(labels)
    return names, by_number


def _label(file: Path, row: Row, classes: Mapping[str, int], by_number: bool) -> int:
    """The number of a row's class."""
    if not by_number:
        if row.label in classes:
            return classes[row.label]
        raise UserError(
            f"{file}: line {row.line}: '{row.label}' is not among the classes{nearest(row.label, classes)}."
        )
    if not NUMBER.fullmatch(row.label):
        raise UserError(
            f"{file}: line {row.line}: '{row.label}' is no number, but the labels of the training file are."
        )
    if not 0 <= int(row.label) < len(classes):
        raise UserError(
            f"{file}: line {row.line}: label {int(row.label)}, but the {len(classes)} classes are numbered"
            " from 0."
        )
    return int(row.label)
