"""The page that a job leaves beside its results when it ends."""

from pathlib import Path

from hafrm_ds.training.logging import RunLog


def leave_report(folder: Path, log: RunLog) -> None:
    """Draw FOLDER/report.html of what has been written there. What can go wrong in it must not cost the results: it is
    a warning."""
    try:
        from hafrm_ds.evaluation.report.writing import write_report  # matplotlib loads for long

        log.print(f"report: {write_report(folder)}")
    except Exception as error:
        log.warn(f"no report was drawn: {error!r}; later: python launch/report.py {folder}")
