"""report.html: one file that needs nothing else, for a run, an evaluation, several of them side by side, a comparison
of methods or of rewards, what models refuse, or rounds."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hafrm_ds import __version__
from hafrm_ds.data.tables import printable
from hafrm_ds.durability import write_whole
from hafrm_ds.evaluation.agreement import AGREEMENT_FILE
from hafrm_ds.evaluation.comparison import COMPARISON_FILE
from hafrm_ds.evaluation.policy_tables import POLICIES_FILE
from hafrm_ds.evaluation.refusal.measures import REFUSALS_FILE, REFUSALS_FOLDER
from hafrm_ds.evaluation.report.agreement_page import agreement_page
from hafrm_ds.evaluation.report.comparison_page import comparison_page
from hafrm_ds.evaluation.report.methods_page import methods_page
from hafrm_ds.evaluation.report.policies_page import policies_page
from hafrm_ds.evaluation.report.reading import Results, distinct_names, read_comparison, read_results
from hafrm_ds.evaluation.report.refusal_page import refusal_page
from hafrm_ds.evaluation.report.results_page import results_page
from hafrm_ds.evaluation.report.rounds_page import rounds_page
from hafrm_ds.evaluation.round_tables import ROUNDS_FILE
from hafrm_ds.processes.console import Console

REPORT_FILE = "report.html"


def write_report(folder: Path, file: Path | None = None) -> Path:
    """The page of a run, whatever state it is in, of an evaluation, of a comparison of methods or rewards, of
    refusals, or of rounds; returns the file.

    Args:
        file: default: FOLDER/report.html.

    Raises:
        DataError: the folder holds none of these, a file in it cannot be read, or the report cannot be written.
    """
    file = file or folder / REPORT_FILE
    if (folder / COMPARISON_FILE).exists():
        comparison, runs = read_comparison(folder)
        measured = folder / REFUSALS_FOLDER / REFUSALS_FILE
        refusals = {"refusals": refusal_page(json.loads(measured.read_text())) if measured.exists() else None}
        if "sweep" in comparison:  # there may be thousands of runs, which no page lays side by side
            return write(file, "sweep.html", methods_page(comparison, []) | refusals)
        return write(file, "methods.html", methods_page(comparison, named_results(runs)) | refusals)
    if (folder / AGREEMENT_FILE).exists():
        return write(file, "agreement.html", agreement_page(json.loads((folder / AGREEMENT_FILE).read_text())))
    if (folder / REFUSALS_FILE).exists():
        return write(file, "refusals.html", refusal_page(json.loads((folder / REFUSALS_FILE).read_text())))
    if (folder / POLICIES_FILE).exists():
        return write(file, "policies.html", policies_page(json.loads((folder / POLICIES_FILE).read_text())))
    if (folder / ROUNDS_FILE).exists():
        return write(file, "rounds.html", rounds_page(json.loads((folder / ROUNDS_FILE).read_text())))
    return write(file, "results.html", results_page(read_results(folder)))


def write_comparison_report(folders: list[Path], file: Path) -> Path:
    """Lay several runs or evaluations side by side on one page; returns the file. Raises as `write_report` does."""
    return write(file, "comparison.html", comparison_page(named_results(folders)))


def named_results(folders: list[Path]) -> list[Results]:
    """Runs or evaluations with names that tell them apart."""
    names = distinct_names(folders)
    return [replace(read_results(folder), name=name) for folder, name in zip(folders, names, strict=True)]


def write(file: Path, template: str, page: Any) -> Path:
    """Render a page into a file, which is there whole or not at all."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("hafrm_ds.evaluation.report"), PackageLoader("hafrm_ds", ".")]),  # style.css
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=as_shown,
    )
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    html = environment.get_template(template).render(page=page, version=__version__, written=written)
    write_whole(file, html.encode())
    return file


def as_shown(value: Any) -> Any:
    """Control characters of the data are shown as escapes; charts are markup already."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def leave_report(folder: Path, log: Console) -> None:
    """Draw FOLDER/report.html of what has been written there. What can go wrong in it must not cost the results: it is
    a warning."""
    try:
        log.print(f"report: {write_report(folder)}")
    except Exception as error:
        log.warn(f"no report was drawn: {error!r}; later: python launch/report.py {folder}")
