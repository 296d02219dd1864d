"""Draw the report of a run, an evaluation or a comparison of methods, or lay several runs or evaluations side by side.

    python launch/report.py FOLDER                            writes FOLDER/report.html
    python launch/report.py FOLDER FOLDER ... --output FILE   writes one page that compares them

A run may still be going on. Training, evaluation and comparison draw their reports themselves when they end.
"""

import argparse
from pathlib import Path

from hafrm_ds.errors import run_alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of a run, evaluation or comparison")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: FOLDER/report.html; comparison.html here")
    arguments = parser.parse_args()
    from hafrm_ds.evaluation.report.writing import write_comparison_report, write_report

    if len(arguments.folders) == 1:
        file = write_report(arguments.folders[0], arguments.output)
    else:
        file = write_comparison_report(arguments.folders, arguments.output or Path("comparison.html"))
    print(file)


if __name__ == "__main__":
    run_alone(main)
