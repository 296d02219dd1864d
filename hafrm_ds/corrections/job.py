"""Dialogues by the hundred, several at once, that may be killed at any time.

scenario -> DIR/dialogues/NNNNNN.json, each whole or not there -> DIR/pairs.jsonl, DIR/report.json
"""

import hashlib
import json
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from hafrm_ds.corrections.dialogue import Dialogue
from hafrm_ds.corrections.pairs import figures_of, rows_of
from hafrm_ds.corrections.scenario import Case, Scenario
from hafrm_ds.corrections.seats import PolicySeat, Seated, open_seats
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import ConfigError, UserError
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.endpoint import EndpointError, Unanswered

PAIRS_FILE, REPORT_FILE = "pairs.jsonl", "report.json"
REASONS_SHOWN = 20
HOW = ("output_dir", "cases", "dialogues", "parallel")
"""Options that no dialogue depends on by itself; of the cases the content counts."""


def correct(scenario: Scenario, processes: Processes) -> int:
    """Play the dialogues that are not there yet, and write the pairs of all; returns how many dialogues have failed.

    Raises:
        ConfigError, DataError, ModelError: scenario, cases or a policy cannot be used. EndpointError: an endpoint
            answers nobody; what has been played stays.
    """
    if processes.world_size > 1:
        raise ConfigError(["launch/correct.py runs in one process; --parallel says how many dialogues at once"])
    log = Console(processes)
    cases = scenario.read_cases()
    seats = open_seats(scenario, processes)
    folder = scenario.output_dir / "dialogues"
    made = [scenario.output_dir / name for name in (PAIRS_FILE, REPORT_FILE)]
    claim_folder(folder, identity_of(scenario, cases, seats), makes=made)
    files = [folder / f"{number:06}.json" for number in range(scenario.dialogues or len(cases))]
    failed = play_missing(files, scenario, cases, seats, log)
    write_results(files, failed, scenario, log)
    return len(failed)


def identity_of(scenario: Scenario, cases: list[Case], seats: dict[str, Seated]) -> dict[str, Any]:
    """Collect what the dialogues depend on: those of another job never mix with these."""
    settings = scenario.model_dump(mode="json", exclude={*HOW})
    for name, seat in seats.items():
        settings["seats"][name] |= {"endpoint": None, "model": seat.identity()}
    return settings | {"cases": hashlib.sha256(json.dumps(cases).encode()).hexdigest()}


def play_missing(
    files: list[Path], scenario: Scenario, cases: list[Case], seats: dict[str, Seated], log: Console
) -> dict[int, str]:
    """Play each dialogue whose file is not there, several at once -> number of each that failed, and why.

    Raises:
        EndpointError: an endpoint answers nobody.
    """
    missing = [number for number, file in enumerate(files) if not file.exists()]
    if len(missing) < len(files):
        log.print(f"{len(files) - len(missing):,} of {len(files):,} dialogues are there already")
    if not missing:
        return {}
    is_over = threading.Event()
    failed: dict[int, str] = {}

    def check() -> None:
        if is_over.is_set():
            raise UserError("the job has ended")

    def play(number: int) -> tuple[int, str]:
        """-> number, and why the dialogue has failed: "" if it has not"""
        check()
        try:
            record = Dialogue(scenario, seats, number, cases[number % len(cases)], check).play()
        except Unanswered as error:
            return number, str(error)
        write_whole(files[number], json.dumps(record, ensure_ascii=False).encode())
        return number, ""

    try:
        # Its threads are daemons: a process that is stopped does not wait for a request, which may take `attempts` x
        # `timeout`.
        with ThreadPool(scenario.parallel) as pool, log.progress("dialogues", len(missing), "dialogues") as progress:
            for number, reason in pool.imap_unordered(play, missing):
                failed |= {number: reason} if reason else {}
                progress.advance(1)
    except EndpointError as error:
        raise EndpointError(f"{error}. Dialogues that were played are kept: start again to play the others") from error
    finally:
        is_over.set()
        for seat in seats.values():
            if isinstance(seat, PolicySeat):
                seat.close()
    return dict(sorted(failed.items()))


def write_results(files: list[Path], failed: dict[int, str], scenario: Scenario, log: Console) -> None:
    records = [json.loads(file.read_bytes()) for number, file in enumerate(files) if number not in failed]
    pairs = [row for record in records for row in rows_of(record, scenario)]
    report: dict[str, Any] = {"scenario": scenario.name, "dialogues": len(files), "failed": failed} | figures_of(
        records, pairs
    )
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in pairs]
    write_whole(scenario.output_dir / PAIRS_FILE, b"".join(lines))
    write_whole(scenario.output_dir / REPORT_FILE, json.dumps(report, indent=2).encode())
    for number, reason in list(failed.items())[:REASONS_SHOWN]:
        log.warn(f"dialogue {number} has failed: {reason}")
    if failed:
        log.warn(f"{len(failed):,} of {len(files):,} dialogues have failed; start again to try these anew")
    for speaker, figures in report["seats"].items():
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in figures["outcomes"].items())
        log.print(f"{speaker}: {figures['messages']:,} messages: {outcomes or 'none'}")
    for name, counts in report["tokens"].items():
        if counts["read"]:
            log.print(f"{name}: its endpoint has read {counts['read']:,} tokens and written {counts['written']:,}")
    words = report["words"]
    if not pairs:
        log.warn("no pair: no draft of the seat that is to be trained was corrected")
        return
    log.print(
        f"{len(pairs):,} pairs in {scenario.output_dir / PAIRS_FILE}; words of a correction "
        f"{words['chosen']:.1f}, of a draft {words['rejected']:.1f}; longer are {words['share_chosen_longer']:.0%}"
    )
    if repeats := len(pairs) - report["different_pairs"]:
        log.warn(f"{repeats:,} pairs repeat another one: do the endpoints draw at random, and heed temperatures?")
