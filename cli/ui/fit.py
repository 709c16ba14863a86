"""Tables on narrow terminals: cells wrap, columns come closer, or else a row is a block of lines. Nothing is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.cells import cell_len
from rich.table import Column, Table

INDENT = "  "


def fitted(table: Table, width: int) -> Table:
    """The table, changed as far as it has to be for a terminal of `width` columns."""
    if full_width(table) <= width:
        return table
    if _needed(table, _least) > width:
        table.padding = 0
    if _needed(table, _least) > width:
        return stacked(table, width)
    slack = width - _needed(table, _least)
    for column in table.columns:  # without a width of its own, rich may give one less than its longest word
        column.width = min(_most(column), _least(column) + slack)
        slack -= column.width - _least(column)
    return table


def full_width(table: Table) -> int:
    """The width of the table with nothing wrapped."""
    return _needed(table, _most)


def _needed(table: Table, of: Callable[[Column], int]) -> int:
    """The width of the whole table, where each column is as wide as the function `of` says."""
    _, right, _, left = table.padding
    between = len(table.columns) + 1 if table.box else 0
    return sum(of(column) + left + right for column in table.columns) + between


def _most(column: Column) -> int:
    """The width of a column whose cells do not wrap."""
    lines = [line for text in _texts(column) for line in text.splitlines()]
    return max(column.min_width or 0, *map(cell_len, lines), 0)


def _least(column: Column) -> int:
    """The width of a column whose cells wrap at spaces, if they may."""
    if column.no_wrap:
        return _most(column)
    return max(column.min_width or 0, *(cell_len(word) for text in _texts(column) for word in text.split()), 0)


def _texts(column: Column) -> list[str]:
    return [str(column.header), *map(str, column.cells)]


def stacked(table: Table, width: int) -> Table:
    """A block of lines for every row: `heading value`, as many on a line as fit."""
    made = Table(box=None, show_header=False, padding=0)
    made.add_column(overflow="fold")
    headings = [" ".join(str(column.header).split()) for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        made.add_row("\n".join(_block(headings, [str(cell) for cell in cells], width)))
    return made


def _block(headings: list[str], cells: list[str], width: int) -> Iterator[str]:
    """The lines of one row; those after the first are indented, and an empty cell is left out."""
    line = ""
    for heading, cell in zip(headings, cells, strict=True):
        part = " ".join([heading, *cell.split()]).strip()
        if not cell.strip():
            continue
        if line and cell_len(f"{line}, {part},") > width:
            yield f"{line},"
            line = INDENT + part
        else:
            line = f"{line}, {part}" if line else part
    yield line
