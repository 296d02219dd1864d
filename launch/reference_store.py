"""Look after a store of reference log-probs.

    python launch/reference_store.py list STORE             namespaces, values, sizes
    python launch/reference_store.py verify STORE           check every file; exit status 1 if one is bad
    python launch/reference_store.py prune STORE            one shard a namespace, without doubles and failed files
    python launch/reference_store.py merge STORE FROM       take over from another store what is missing

A store is copied to another machine by copying its folder. Prune when no job writes; the others may run at any time.
"""

import sys
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from hafrm_ds.errors import run_alone
from hafrm_ds.options import Section, read
from hafrm_ds.reference.maintenance import NamespaceReport, merge_stores, prune_store, verify_store
from hafrm_ds.reference.store import StoreError


class StoreOptions(Section):
    """What is done to which store."""

    action: Literal["list", "verify", "prune", "merge"]
    """As said above."""
    store: Path
    """Folder of the store."""
    source: Path | None = None
    """merge only: the store to take over from."""

    def contradictions(self) -> list[str]:
        if (self.action == "merge") != (self.source is not None):
            return ["merge takes two folders, the others one"]
        return []


def main() -> int:
    arguments = read(StoreOptions, sys.argv[1:], about=__doc__, positional=["action", "store", "source"])
    for folder in filter(None, (arguments.store if arguments.action != "merge" else None, arguments.source)):
        if not folder.is_dir():
            raise StoreError(f"there is no reference store {folder}")
    if arguments.source is not None:
        merge_stores(arguments.source, arguments.store)
    elif arguments.action == "prune":
        prune_store(arguments.store)
    reports = verify_store(arguments.store)
    Console().print(table_of(reports))
    bad = [line for report in reports for line in report.bad]
    print("\n".join(bad))
    return 1 if bad and arguments.action == "verify" else 0


def table_of(reports: list[NamespaceReport]) -> Table:
    table = Table("namespace", "model", "dtype")
    for name in ("values", "shards", "bytes", "bad files"):
        table.add_column(name, justify="right")
    for report in reports:
        facts = [str(report.facts.get(key, "unknown")) for key in ("model", "dtype")]
        numbers = [f"{number:,}" for number in (report.values, report.shards, report.bytes, len(report.bad))]
        table.add_row(report.name, *facts, *numbers)
    return table


if __name__ == "__main__":
    run_alone(main)
