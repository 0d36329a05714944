"""The columns of text of a table: found by their usual names, and read as texts or as pairs of them."""

from collections.abc import Sequence

from flaxmpc.data.batches import Text
from flaxmpc.data.tables import Table
from flaxmpc.errors import brief, listed

# The usual names of columns of text. Those of pairs come first: a table with question and sentence is one of pairs.
_USUAL = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
)


def text_columns(table: Table, given: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of a table's texts: one, or two of pairs.

    Args:
        table: the table.
        given: the columns that were asked for; none: the first usual names that the table has.

    Raises:
        ValueError: more than two are given; or none is, and the table has no usual name.
    """
    if len(given) > 2:
        raise ValueError(f"a row has one text or two, not {len(given)}: {', '.join(given)}")
    if given:
        return tuple(given)
    for columns in _USUAL:
        if set(columns) <= set(table.columns):
            return columns
    usual = " or ".join("+".join(columns) for columns in _USUAL)
    raise ValueError(
        f"{table.source} has no column of text that is named as usual ({usual}). Its columns are "
        f"{listed(table.columns)}: name one or two as text_columns"
    )


def require(table: Table, columns: Sequence[str]) -> None:
    """ValueError: the table lacks a column; says which it has."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{table.source} has no column {listed(missing)}. Its columns are {listed(table.columns)}")


def texts(table: Table, columns: Sequence[str], warnings: list[str] | None = None) -> list[Text]:
    """The texts of a table in the order of its rows; pairs, where there are two columns.

    Args:
        table: has the columns, see `require`.
        columns: one or two.
        warnings: gets a line that counts the empty texts, since published sets have some (QQP); None: one is an error.

    Raises:
        ValueError: a value is no string, or empty; says in which row.
    """
    empty = 0
    sides = [list(table.columns[column][:]) for column in columns]
    for column, values in zip(columns, sides, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                what = "is missing" if value is None else f"is {brief(value)}, not a string"
                raise ValueError(f"{table.at(row)}: {column} {what}")
            if not value.strip():
                if warnings is None:
                    raise ValueError(f"{table.at(row)}: {column} is empty")
                empty += 1
    if empty and warnings is not None:
        warnings.append(f"{table.source}: {empty} texts are empty")
    return sides[0] if len(sides) == 1 else list(zip(*sides, strict=True))  # pyright: ignore[reportReturnType]
