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

from hafrm_ds.data.tables import Cell, Table, count
from hafrm_ds.errors import run_alone
from hafrm_ds.options import Section, read
from hafrm_ds.reference.maintenance import NamespaceReport, merge_stores, prune_store, verify_store


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
    rows = []
    for report in reports:
        facts = [Cell(str(report.facts.get(key, "unknown"))) for key in ("model", "dtype")]
        rows.append((report.name, [*map(count, (report.values, report.shards, report.bytes, len(report.bad))), *facts]))
    return Table(rows, ("namespace", "values", "shards", "bytes", "bad files", "model", "dtype"), texts=2)


if __name__ == "__main__":
    run_alone(main)
