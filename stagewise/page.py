"""A self-contained HTML page with figures and tables: page.html with plotly and the data inside."""

import importlib.util
from pathlib import Path
from typing import Any

from stagewise.errors import UserError, file_errors
from stagewise.fileio import atomic_write, encode_json


def check_plotly() -> None:
    """Raise UserError if plotly is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise UserError(
            "--html: plotly is not installed: pip install plotly (its tested version is in "
            "requirements-extra.txt), or remove --html"
        )


def write_page(path: Path, data: dict[str, Any]) -> None:
    """Write the page atomically. It loads nothing from the network.

    Args:
        data: what page.html shows; see `plot.page_data`.

    Raises:
        UserError: if plotly is not installed, or the file cannot be written.
    """
    check_plotly()
    from plotly.offline import get_plotlyjs

    template = Path(__file__).with_name("page.html").read_text("utf-8")
    json = encode_json(data).replace("<", "\\u003c")  # would otherwise end the script
    before, between = template.split("/*PLOTLY*/")
    between, after = between.split("/*DATA*/")
    with file_errors(path, "free disk space, or use another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join((before, get_plotlyjs(), between, json, after)))
    print(path)
