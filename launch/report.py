"""Draw the report of a run, an evaluation or a comparison of methods, or lay several runs or evaluations side by side.

    python launch/report.py FOLDER                            writes FOLDER/report.html
    python launch/report.py FOLDER FOLDER ... --output FILE   writes one page that compares them

A run may still be under way. Training, evaluation and comparison draw their reports themselves when they end.
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from hafrm_ds.errors import run_alone
from hafrm_ds.options import Section, as_list, read


class ReportOptions(Section):
    """What is drawn."""

    folders: Annotated[list[Path], Field(min_length=1), BeforeValidator(as_list)]
    """Of a run, an evaluation or a comparison."""
    output: Path | None = None
    """The page. Default: FOLDER/report.html; of several folders comparison.html here."""


def main() -> None:
    arguments = read(ReportOptions, sys.argv[1:], about=__doc__, positional=["folders"])
    from hafrm_ds.evaluation.report.writing import write_comparison_report, write_report

    if len(arguments.folders) == 1:
        file = write_report(arguments.folders[0], arguments.output)
    else:
        file = write_comparison_report(arguments.folders, arguments.output or Path("comparison.html"))
    print(file)


if __name__ == "__main__":
    run_alone(main)
