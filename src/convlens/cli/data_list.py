"""``convlens data list``."""

from __future__ import annotations

from convlens.cli.output import first_line, print_table


def data_list() -> None:
    """List the known data sets and their locations."""
    from convlens.data.builtin import DATASETS, locate
    from convlens.data.download import search_path

    rows = [("data set", "description", "location")]
    rows += [(name, first_line(DATASETS[name]), locate(name)) for name in DATASETS.names()]
    print_table(rows)
    print(f"searched: {', '.join(map(str, search_path()))}")
