"""report.html: one file that needs nothing else, for a run, an evaluation, or several of them side by side."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hafrm_ds import __version__
from hafrm_ds.data.report import printable
from hafrm_ds.errors import UserError
from hafrm_ds.evaluation.report.comparison_page import comparison_page
from hafrm_ds.evaluation.report.methods_page import methods_page
from hafrm_ds.evaluation.report.reading import Results, distinct_names, read_evaluation, read_results, read_run
from hafrm_ds.evaluation.report.results_page import results_page

REPORT_FILE = "report.html"


def write_run_report(run_folder: Path) -> Path:
    """Write RUN/report.html, whatever state the run is in; returns the file.

    Raises:
        DataError: a file of the run cannot be read; the message names it.
        UserError: the report cannot be written.
    """
    return write(run_folder / REPORT_FILE, "results.html", results_page(read_run(run_folder)))


def write_evaluation_report(folder: Path) -> Path:
    """Write report.html into the folder of an evaluation (evaluation.json, evaluation/SET.parquet); returns the file.

    Raises as `write_run_report` does.
    """
    return write(folder / REPORT_FILE, "results.html", results_page(read_evaluation(folder)))


def write_report(folder: Path, file: Path | None = None) -> Path:
    """The report of a run or an evaluation, whichever the folder holds. Raises as `write_run_report` does."""
    return write(file or folder / REPORT_FILE, "results.html", results_page(read_results(folder)))


def write_comparison_report(run_folders: list[Path], file: Path) -> Path:
    """Lay several runs or evaluations side by side on one page; returns the file.

    Raises as `write_run_report` does.
    """
    return write(file, "comparison.html", comparison_page(named_results(run_folders)))


def write_methods_report(comparison: dict[str, Any], run_folders: list[Path], file: Path) -> Path:
    """The page of a comparison of methods, with all of its runs side by side; returns the file.

    Args: comparison: as comparison.json has it.

    Raises as `write_run_report` does.
    """
    return write(file, "comparison.html", methods_page(comparison, named_results(run_folders)))


def named_results(folders: list[Path]) -> list[Results]:
    """Runs or evaluations with names that tell them apart."""
    names = distinct_names(folders)
    return [replace(read_results(folder), name=name) for folder, name in zip(folders, names, strict=True)]


def write(file: Path, template: str, page: Any) -> Path:
    """Render a page into a file, which is there whole or not at all."""
    environment = Environment(
        loader=PackageLoader("hafrm_ds.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=as_shown,
    )
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    html = environment.get_template(template).render(page=page, version=__version__, written=written)
    draft = file.with_name(f".{file.name}")
    try:
        draft.write_text(html, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
    return file


def as_shown(value: Any) -> Any:
    """Control characters of the data are shown as escapes; charts are markup already."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
