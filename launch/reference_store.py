"""Look after a store of reference log-probs.

    python launch/reference_store.py list STORE             namespaces, values, sizes
    python launch/reference_store.py verify STORE           check every file; exit status 1 if one is bad
    python launch/reference_store.py prune STORE            one shard a namespace, without doubles and failed files
    python launch/reference_store.py merge STORE FROM       take over from another store what is missing

A store is copied to another machine by copying its folder. Prune when no job writes; the others may run at any time.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hafrm_ds.errors import run_alone
from hafrm_ds.reference.maintenance import NamespaceReport, merge_stores, prune_store, verify_store
from hafrm_ds.reference.store import StoreError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "verify", "prune", "merge"))
    parser.add_argument("store", type=Path)
    parser.add_argument("source", type=Path, nargs="?", metavar="FROM", help="merge only")
    arguments = parser.parse_args()
    if (arguments.action == "merge") != (arguments.source is not None):
        parser.error("merge takes two folders, the others one")
    for folder in filter(None, (arguments.store if arguments.action != "merge" else None, arguments.source)):
        if not folder.is_dir():
            raise StoreError(f"there is no reference store {folder}")
    if arguments.action == "merge":
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
