"""Tables on the screen: `table(["batch", "tokens/s"], [[1, "35.0"], [8, "249.1"]])`."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence], indent: int = 2) -> None:
    """Print `rows` under `columns`: the first column to the left, the others to the right.

    A cell is anything `str` takes; None stays empty. Nothing is cut or wrapped, on any terminal.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="")
    for number, column in enumerate(columns):
        grid.add_column(Text(column), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(width=300, highlight=False).print(Padding(grid, (0, 0, 0, indent), expand=False))
