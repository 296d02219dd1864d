"""The three objectives of the paper from the same start on the same data: Baseline, DPO and HaF, a run for each seed.

Every training is a run of launch/train.py in processes of its own, one after another: an engine that has ended keeps
its weights in memory, and a run that fails or is stopped must not take the others with it. Where a single process runs
on a CPU, these are forks of one that has imported everything (`fork_server`).
"""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import environ
from pathlib import Path
from typing import Any

import yaml

from hafrm_ds.config import TrainConfig
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, UserError
from hafrm_ds.evaluation.comparison import COMPARISON_FILE, TWO_MODELS, Judged, Method, compare, run_folder, two_models
from hafrm_ds.evaluation.comparison_tables import render_comparison, seeds_in_words
from hafrm_ds.evaluation.pair_scores import SCORES_FOLDER, PairScores, load_all
from hafrm_ds.evaluation.refusal.job import measure_refusals, num_prompts
from hafrm_ds.evaluation.refusal.measures import REFUSALS_FOLDER
from hafrm_ds.evaluation.refusal.options import RefusalOptions
from hafrm_ds.evaluation.report.reading import SUMMARY_FILE
from hafrm_ds.evaluation.report.writing import leave_report
from hafrm_ds.model.loading import local_folder
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import leave_together
from hafrm_ds.processes.ranks import FailedElsewhere, Processes
from hafrm_ds.processes.stopping import STOPPED_STATUS, Stopped
from hafrm_ds.training.comparison_plan import ComparisonPlan, pairs_seen
from hafrm_ds.training.fork_server import Forked, ForkServer
from hafrm_ds.training.resume import FREE_TO_CHANGE, changed_since
from hafrm_ds.training.sweep import Arm

Start = Callable[[list[str], dict[str, str]], subprocess.Popen | Forked]

CONTENT = ("model.name_or_path", "model.revision", "data.train", "data.eval")
"""When a run is resumed, the content of these is compared. Of a finished run it is not read again: their words count.
"""


def train_and_compare(
    config: TrainConfig,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    train_script: Path,
    processes: Processes,
    sweep: Mapping[str, Any] | None = None,
    refusals: Sequence[str] = (),
) -> None:
    """Train every arm with every seed, where that is not done yet, and compare them on every set of data.eval.

    Leaves runs/ARM-seedN/ in config.output_dir, and after every seed comparison.json and report.html of the seeds that
    are complete. All processes call this together.

    Args:
        train_script: launch/train.py, which each training is a run of.
        sweep: what comparison.json says of the swept options; None where nothing is swept.
        refusals: prompts, as launch/refusals.py takes them, on which the refusals of all trainings are measured.

    Raises:
        Stopped: a signal has ended it; the same command resumes it.
        DataError: a training has seen other pairs than the rest.
    """
    log = Console(processes)
    runs = {seed: {arm.name: run_config(config, arm, seed) for arm in arms} for seed in seeds}
    finished = finished_runs(runs, processes)
    plan = make_plan(arms, runs, finished, processes)
    log.print(f"[bold]{plan.in_words}[/bold]")
    if refusals:  # what is wrong with them is said before the first training, not after the last
        processes.from_first("prompts of refusals", lambda: num_prompts(refusals_of(config, runs, refusals)))
    methods = [Method(arm.name, arm.judge, [], arm.cells) for arm in arms]
    number, sets = 0, list(config.data.eval)
    with starter(train_script, processes) as start:
        # Seed by seed, so that what there is after a while compares all arms.
        for place, of_seed in enumerate(runs.values()):
            is_last, has_trained = place == len(seeds) - 1, False
            for name, run in of_seed.items():
                number += 1
                title = f"training {number} of {len(seeds) * len(arms)}: {run.output_dir}"
                if run.output_dir in finished:
                    log.print(f"{title} is finished")
                    continue
                log.print(f"\n[bold]{title}[/bold]")
                train_one(run, start, processes)
                has_trained = True
                plan.note(name, seconds_of(run))
                log.print(f"{sum(plan.left.values()):,} trainings are left{plan.time_left}")
            if not processes.is_first:
                continue
            check_same_data(arms, of_seed)
            add_trainings(methods, of_seed, sets[0])
            if has_trained or is_last:
                results = compare(methods, sets, seeds[: place + 1], seeds, sweep)
                file = config.output_dir / COMPARISON_FILE
                write_whole(file, json.dumps(results, indent=2, allow_nan=False).encode())
                if is_last:
                    log.print(render_comparison(results))
                log.print(f"\nthe results of {seeds_in_words(results)} are in {file}")
                leave_report(config.output_dir, log)
    if refusals:
        measured = refusals_of(config, runs, refusals)
        # Other seeds, arms or prompts than before are measured anew: the folder is the comparison's.
        measure_refusals(measured, processes.for_job("refusals"), replaces=True)
        if processes.is_first:
            leave_report(config.output_dir, log)
    leave_together(processes)


Runs = Mapping[int, Mapping[str, TrainConfig]]
"""Seed -> name of an arm -> the configuration of its training."""


def refusals_of(config: TrainConfig, runs: Runs, prompts: Sequence[str]) -> RefusalOptions:
    """The measurement of what the trainings refuse, and the weights that they started from."""
    start = config.model
    models = {"start": str(local_folder(start)) if start.revision else start.name_or_path}
    models |= {
        f"{name}-seed{seed}": str(run.output_dir / "final")
        for seed, of_seed in runs.items()
        for name, run in of_seed.items()
    }
    return RefusalOptions(
        models=models,
        prompts=list(prompts),
        output_dir=config.output_dir / REFUSALS_FOLDER,
        chat_template=config.data.chat_template,
        trust_remote_code=config.model.trust_remote_code,
        cache_dir=config.data.cache_dir,
    )


def check_same_data(arms: Sequence[Arm], runs: Mapping[str, TrainConfig]) -> None:
    """Raises DataError if trainings of a seed that are to see the same pairs have not: a file was changed between
    them."""
    first: dict[str, tuple[Path, dict[str, str]]] = {}
    for arm in arms:
        folder = runs[arm.name].output_dir
        data = json.loads((folder / SUMMARY_FILE).read_text()).get("data", {})
        other, expected = first.setdefault(arm.data_key, (folder, data))
        if differing := [name for name in expected if data.get(name) != expected[name]]:
            raise DataError(
                f"{folder} has seen other pairs of {differing[0]} than {other}: the data was changed between the two "
                "trainings. Remove the runs with the old data to train them anew"
            )


def finished_runs(runs: Runs, processes: Processes) -> set[Path]:
    """Folders of those that are finished. Raises UserError if one of them has other options."""

    def look() -> list[str]:
        every = (run for of_seed in runs.values() for run in of_seed.values())
        return [str(run.output_dir) for run in every if is_finished(run)]

    return set(map(Path, processes.from_first("finished", look)))


def make_plan(arms: Sequence[Arm], runs: Runs, finished: set[Path], processes: Processes) -> ComparisonPlan:
    """What there is to do, and what the trainings that are finished took."""

    def count() -> dict[str, int]:
        is_over = len(finished) == len(arms) * len(runs)  # then nothing need be there but the runs
        return dict.fromkeys([arm.name for arm in arms], 0) if is_over else pairs_seen(arms)

    plan = ComparisonPlan(processes.from_first("pairs", count), len(runs))
    for of_seed in runs.values():
        for name, run in of_seed.items():
            if run.output_dir in finished:
                plan.note(name, seconds_of(run))
    return plan


def seconds_of(run: TrainConfig) -> float | None:
    """What a training took, from its start to its summary; None where the files do not tell."""
    try:
        seconds = (run.output_dir / SUMMARY_FILE).stat().st_mtime - options_file(run).stat().st_mtime
    except OSError:
        return None
    return seconds if seconds > 0 else None


def add_trainings(methods: Sequence[Method], runs: Mapping[str, TrainConfig], first_set: str) -> None:
    """Add to each method what its training of a seed got right; of DPO also together with the Baseline of its first
    cell. The methods stand cell by cell, each Baseline before the others of its cell."""
    baseline: dict[str, PairScores] = {}
    for method in methods:
        run = runs[method.name]
        scores = {
            name: each for name, each in load_all(run.output_dir / SCORES_FOLDER).items() if name in run.data.eval
        }
        like = methods[0].trainings[0] if methods[0].trainings else {}
        found = {name: Judged.of(each, like.get(name)) for name, each in scores.items()}
        if method.name in method.cells:
            baseline = scores
        elif method.judge == "implicit":
            for name, right in two_models(scores, baseline, first_set).items():
                found[name].right[TWO_MODELS] = right
        method.trainings.append(found)


def train_one(run: TrainConfig, start: Start, processes: Processes) -> None:
    """Train one arm with one seed, or resume it."""
    if processes.is_first:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(options_file(run), run.to_yaml().encode())
    train_in_child(run, start, processes.from_first(f"port {run.output_dir.name}", free_port), processes)


def run_config(config: TrainConfig, arm: Arm, seed: int) -> TrainConfig:
    """The configuration of one training."""
    folder = run_folder(config.output_dir, arm.name, seed)
    return arm.config.model_copy(update={"output_dir": folder, "seed": seed, "resume": "auto"})


def options_file(run: TrainConfig) -> Path:
    """What the training is started with: `--config` takes it to repeat it by hand."""
    return run.output_dir.with_name(f"{run.output_dir.name}.yaml")  # a name may hold a dot: alpha0.2


def is_finished(run: TrainConfig) -> bool:
    """Raises UserError if the folder holds a finished run with other options."""
    if not (run.output_dir / SUMMARY_FILE).exists():
        return False
    saved = yaml.safe_load((run.output_dir / "config.yaml").read_text())
    if list(saved["data"]["eval"]) != list(run.data.eval) and saved["data"]["eval"].keys() == run.data.eval.keys():
        raise UserError(
            f"{run.output_dir} holds a finished run with another order of data.eval "
            f"({', '.join(saved['data']['eval'])}): the first set is that of the training distribution, on which its "
            "combined judge was fitted. Choose another --output_dir, or remove the run to train it anew"
        )
    free = tuple(name for name in FREE_TO_CHANGE if name not in CONTENT)
    if changed := changed_since(saved, run, free):
        lines = "".join(f"\n  - {text}" for text in changed.values())
        raise UserError(
            f"{run.output_dir} holds a finished run with other options:{lines}\nChoose another --output_dir, or remove "
            "the run to train it anew"
        )
    return True


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


@contextmanager
def starter(train_script: Path, processes: Processes) -> Iterator[Start]:
    """How a training is started: with arguments and variables of its environment."""
    server: list[ForkServer] = []  # once there is something to train

    def start(arguments: list[str], variables: dict[str, str]) -> subprocess.Popen | Forked:
        # What a process has to do with CUDA, or with others of its group, no fork of it can take over.
        if processes.world_size > 1 or processes.device.type != "cpu":
            return subprocess.Popen([sys.executable, str(train_script), *arguments], env=environ | variables)
        if not server:
            server.append(ForkServer(train_script))
        return server[0].start(arguments, variables)

    try:
        yield start
    finally:
        for each in server:
            each.close()


def train_in_child(run: TrainConfig, start: Start, port: str, processes: Processes) -> None:
    """Run a training in a child of each process; they meet at a port of their own. A signal is handed on.

    Raises:
        Stopped: the training was stopped. FailedElsewhere: it has failed, and has said why. UserError: it was killed.
    """
    # A store of torchrun's agent still holds what an earlier training has written.
    own = {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    child = start(["--config", str(options_file(run))], own)
    try:
        status = child.wait()
    except Stopped as stop:
        processes.stopping.defer()
        with suppress(UserError):  # a fork server that the same signal has ended
            child.terminate()
            child.wait()
        raise Stopped(f"{stop.reason}; the same command resumes it") from None
    if status == STOPPED_STATUS:
        raise Stopped(f"the training in {run.output_dir} was stopped; the same command resumes it")
    if status < 0:
        raise UserError(
            f"the training in {run.output_dir} was ended by {signal.Signals(-status).name}; the same command resumes it"
        )
    if status:
        raise FailedElsewhere
