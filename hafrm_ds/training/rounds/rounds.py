"""Round after round: the policy answers, a reward ranks, the best and the worst answer become a pair, and both heads
train on these pairs and on human ones.

OUTPUT/round-N/candidates/      answers of the model that the round starts from, and how they are ranked (best_of_n)
OUTPUT/round-N/pairs.jsonl      what they train
OUTPUT/round-N/run/             the training; its final/ is where the next round starts
OUTPUT/round-N/measured/        answers to prompts that no round trains on; of the start in OUTPUT/round-0
OUTPUT/rounds.json, report.html what became of gold, KL, length and accuracy

Each stage leaves whole files and is passed over when they are there, so rounds that were killed resume.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from hafrm_ds.config import TrainConfig
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.evaluation.best_of_n.options import RankingOptions, SamplingOptions
from hafrm_ds.evaluation.best_of_n.ranking import RANKED_FILE, RESULTS_FILE, rank, read_lines
from hafrm_ds.evaluation.best_of_n.sampling import SAMPLING_FILE
from hafrm_ds.evaluation.combined import too_few
from hafrm_ds.evaluation.pair_rows import rows_of_pairs
from hafrm_ds.evaluation.policies import Measuring, measure_policy
from hafrm_ds.evaluation.report.reading import METRICS_FILE, read_rows
from hafrm_ds.evaluation.report.writing import leave_report
from hafrm_ds.evaluation.round_tables import JUDGES, ROUNDS_FILE, render_rounds
from hafrm_ds.model.loading import local_folder
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together, stamp
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import Saved, base_of, open_model
from hafrm_ds.saved.writing import METADATA_FILE
from hafrm_ds.scoring.prompts import key_of
from hafrm_ds.scoring.rows import json_line
from hafrm_ds.training.compare import Start, is_finished, starter, train_one
from hafrm_ds.training.final import DATA_REPORT_FILE
from hafrm_ds.training.resume import changed_options
from hafrm_ds.training.rounds.options import RoundsOptions
from hafrm_ds.training.rounds.pairs import RANKED_ANSWERS, mixed, pairs_of, refuse_held_out

PAIRS_FILE, FACTS_FILE, MEASURED_FILE = "pairs.jsonl", "facts.json", "measures.json"
OPTIONS_FILE = "options.json"
FREE = (
    *("output_dir", "resume", "deepspeed", "checkpoint.", "logging.", "reference."),
    *("data.cache_dir", "data.num_proc", "rounds.num_rounds"),
)
"""Options that may be others when rounds resume."""
SEEDS_OF_A_RUN = 1000
"""Between the random numbers of the rounds of one seed and those of the next."""


@dataclass(frozen=True)
class Rounds:
    """Rounds under way. All processes call its methods together."""

    options: RoundsOptions
    start: Start
    processes: Processes
    log: Console

    def folder(self, number: int) -> Path:
        return self.options.output_dir / f"round-{number}"

    def model(self, number: int) -> str:
        """The model that round `number` has made; 0: where the first one starts."""
        return str(self.folder(number) / "run" / "final") if number else self.options.model.name_or_path

    def run(self) -> None:
        """All rounds that are not done yet; after each, rounds.json and the page."""
        self.measure(0)
        for number in range(1, self.options.rounds.num_rounds + 1):
            self.log.print(f"\n[bold]round {number} of {self.options.rounds.num_rounds}[/bold]")
            self.answer(number)
            self.processes.from_first(f"pairs {number}", partial(self.make_pairs, number))
            self.train(number)
            self.measure(number)
            if self.processes.is_first:
                self.write_results(number)

    def answer(self, number: int) -> None:
        """Let the model that the round starts from answer, and rank what it says."""
        section, policy = self.options.rounds, self.model(number - 1)
        options = RankingOptions(
            model=[section.reward or policy],
            output_dir=self.folder(number) / "candidates",
            max_tokens_per_micro_batch=max_tokens_of(self.options),
            sampling=SamplingOptions(
                prompts=section.prompts,
                policy=policy,
                num_candidates=section.num_candidates,
                temperature=section.temperature,
                top_p=section.top_p,
                max_new_tokens=section.max_new_tokens,
                seed=self.options.seed * SEEDS_OF_A_RUN + number,
                policy_chat_template=None if number > 1 else self.options.data.chat_template,
            ),
            judge=section.judge if section.is_own else None,
            # The fit of a combined judge belongs to the reference of its own training.
            reference=reference_of(self.options),
            trust_remote_code=self.options.model.trust_remote_code,
        )
        with self.timed(number, "answers and ranking"):
            rank(options, self.processes.for_job(f"candidates {number}"))

    def make_pairs(self, number: int) -> None:
        """pairs.jsonl and the facts of the round, unless they are there. Raises DataError if no prompt gives a pair."""
        folder, section = self.folder(number), self.options.rounds
        file = folder / PAIRS_FILE
        if file.exists():
            return
        ranked = read_lines(folder / "candidates" / RANKED_FILE)
        rows, left_out = pairs_of(ranked, section)
        if not rows:
            raise DataError(
                f"round {number}: no prompt gives a pair ({', '.join(f'{k}: {n:,}' for k, n in left_out.items())}). "
                "Lower rounds.min_gap, or draw more different answers (rounds.num_candidates, rounds.temperature)"
            )
        candidates = [each for line in ranked for each in line["candidates"]]
        facts = {
            "prompts_without_candidates": json.loads((folder / "candidates" / SAMPLING_FILE).read_text())["dropped"],
            "prompts_not_scored": json.loads((folder / "candidates" / RESULTS_FILE).read_text())["prompts_not_scored"],
            "ranked_prompts": len(ranked),
            "pairs": len(rows),
            "left_out": dict(left_out),
            "truncated_candidates": sum(not each["ended"] for each in candidates) / len(candidates),
            "candidates": float(np.mean([each["score"] for each in candidates])),
            "best_candidates": float(np.mean([line["candidates"][0]["score"] for line in ranked])),
        }
        write_whole(folder / FACTS_FILE, json.dumps(facts).encode())
        write_whole(file, b"".join(map(json_line, rows)))

    def train(self, number: int) -> None:
        run = self.config_of(number)
        if self.processes.from_first(f"finished {number}", lambda: is_finished(run)):
            self.log.print(f"{run.output_dir} is finished")
            return
        with self.timed(number, "training"):
            train_one(run, self.start, self.processes)
        used, made = self.trained_pairs(number)
        if used < made:
            self.log.warn(
                f"{made - used:,} of the {made:,} ranked pairs were not trained on, dropped or beyond their share of "
                f"the mix: {run.output_dir / DATA_REPORT_FILE} says which"
            )

    def trained_pairs(self, number: int) -> tuple[int, int]:
        """How many of the ranked pairs a round has trained on, and how many there are."""
        report = json.loads((self.folder(number) / "run" / DATA_REPORT_FILE).read_text())
        of_ranked = report["train"]["by_source"][RANKED_ANSWERS]
        return of_ranked["kept"], of_ranked["read"]

    def config_of(self, number: int) -> TrainConfig:
        """The training of a round, which a run folder of its own holds."""
        options, start = self.options.run, self.model(number - 1)
        model: dict[str, Any] = {"name_or_path": start}
        if number > 1 or "reward" in open_start(self.options).heads:
            model["reward_head_init"] = "from_model"
        sources = mixed(self.folder(number) / PAIRS_FILE, options.data.train, self.options.rounds)
        changed = {
            "output_dir": self.folder(number) / "run",
            "seed": options.seed * SEEDS_OF_A_RUN + number,
            "resume": "auto",
            "model": options.model.model_copy(update=model),
            "data": options.data.model_copy(update={"train": sources}),
        }
        return options.model_copy(update=changed)

    def measure(self, number: int) -> None:
        """Measure the policy that a round has made."""
        folder = self.folder(number) / "measured"
        file = folder / MEASURED_FILE
        if self.processes.from_first(f"is measured {number}", file.exists):
            return
        how = measuring_of(self.options)
        with self.timed(number, "measuring"):
            found = measure_policy(
                folder, self.model(number), how, self.processes.for_job(f"measured {number}"), self.log
            )
        if found is not None:
            write_whole(file, json.dumps(found.to_json(), indent=2).encode())

    def timed(self, number: int, stage: str) -> "Timed":
        return Timed(self.folder(number) / "seconds.json", stage, self.processes)

    def write_results(self, last: int) -> None:
        """rounds.json of the rounds so far, the table and the page."""
        rounds, section = [self.row(number) for number in range(last + 1)], self.options.rounds
        results = {
            "ranked_by": self.options.rounds.reward
            or f"the model that a round starts from ({self.options.rounds.judge})",
            "gold": section.gold,
            "sets": list(self.options.data.eval),
            "rounds": rounds,
        }
        file = self.options.output_dir / ROUNDS_FILE
        write_whole(file, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False).encode())
        self.log.print(render_rounds(results))
        self.log.print(f"the results are in {escape(str(file))}")
        leave_report(self.options.output_dir, self.log)

    def row(self, number: int) -> dict[str, Any]:
        """What rounds.json says of a round."""
        folder = self.folder(number)
        facts = json.loads((folder / FACTS_FILE).read_text()) if number else {}
        if number:
            evaluated = json.loads((Path(self.model(number)) / METADATA_FILE).read_text())["evaluation"]
        else:  # the first evaluation of the first training, where it was asked for, is of the model that it starts from
            rows = read_rows(self.folder(1) / "run" / METRICS_FILE)
            evaluated = {row["set"]: row for row in rows if row["kind"] == "eval" and row["step"] == 0}
        accuracy = {
            name: {judge: metrics[key] for judge in JUDGES if (key := f"accuracy/{judge}") in metrics}
            for name, metrics in evaluated.items()
        }
        seconds = folder / "seconds.json"
        return {
            "round": number,
            "model": self.model(number),
            **json.loads((folder / "measured" / MEASURED_FILE).read_text()),
            **facts,
            **({"trained_pairs": self.trained_pairs(number)[0]} if number else {}),
            "accuracy": accuracy,
            "seconds": json.loads(seconds.read_text()) if seconds.exists() else {},
        }


@dataclass
class Timed:
    """Adds the seconds of a stage to a file, also those of an earlier start that was killed later."""

    file: Path
    stage: str
    processes: Processes
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, kind: type | None, *error: object) -> None:
        if not self.processes.is_first or kind is not None:
            return
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        known[self.stage] = known.get(self.stage, 0.0) + time.monotonic() - self.started
        write_whole(self.file, json.dumps(known).encode())


def open_start(options: RoundsOptions) -> Saved:
    """The model that the first round starts from, without its weights."""
    model, template = options.model, options.data.chat_template
    return open_model(model.name_or_path, chat_template=template, trust_remote_code=model.trust_remote_code)


def reference_of(options: RoundsOptions) -> str | None:
    """What an implicit reward is measured against. (The fit of a combined judge belongs to the reference of its own
    training.)"""
    section = options.rounds
    return base_of(open_start(options)) if section.is_own and section.judge == "implicit" else None


def rewards_of(options: RoundsOptions) -> dict[str, dict[str, Any]]:
    """Name -> what judges the answers to evaluation_prompts, the same in all rounds: as `reward` what ranks the answers
    of the first one, and gold."""
    section, start = options.rounds, options.model.name_or_path
    own = {"model": Path(start), "judge": section.judge, "reference": reference_of(options)}
    rewards: dict[str, dict[str, Any]] = {"reward": own if section.is_own else {"model": Path(str(section.reward))}}
    return rewards | ({} if section.gold is None else {"gold": {"model": Path(section.gold)}})


def measuring_of(options: RoundsOptions) -> Measuring:
    """How every policy of the rounds is measured."""
    section = options.rounds
    return Measuring(
        start=options.model.name_or_path,
        option="rounds.evaluation_prompts",
        prompts=section.evaluation_prompts,
        rewards=rewards_of(options),
        max_new_tokens=section.max_new_tokens,
        max_tokens=max_tokens_of(options),
        seed=options.seed * SEEDS_OF_A_RUN,
        loading={
            "chat_template": options.data.chat_template,
            "trust_remote_code": options.model.trust_remote_code,
        },
    )


def max_tokens_of(options: RoundsOptions) -> int:
    """Token budget of one forward pass that scores."""
    budget = options.batch.max_tokens_per_micro_batch
    return 8192 if budget == "auto" else budget


def claim_rounds(options: RoundsOptions, log: Console) -> None:
    """Claim the folder, before anything is computed.

    Raises:
        DataError: it holds other rounds, a prompt is trained on and measured, or a judge would have too few pairs.
            ModelError: the start cannot rank its own answers.
    """
    start, name, section = open_start(options), options.model.name_or_path, options.rounds
    if section.is_own and section.judge == "implicit" and base_of(start) is None:
        raise ModelError(
            f"{name} does not say what it was trained from, so its implicit reward has no reference: start from the "
            "final/ of a training, or give rounds.reward"
        )
    if section.is_own and section.judge != "implicit" and "reward" not in start.heads:
        raise ModelError(
            f"{name} has no reward head that was trained, and ranks its own answers: start from the final/ of a "
            "training, give rounds.judge implicit, or give rounds.reward"
        )
    if section.is_own and section.judge == "combined":
        refuse_too_few(options)
    refuse_held_out(section, options.data)
    content = {"measured": measuring_of(options).identity(), "prompts": stamp(section.prompts)}
    file, current = options.output_dir / OPTIONS_FILE, options.model_dump(mode="json")
    if file.exists() and (differing := changed_options(json.loads(file.read_text()), current, FREE)):
        raise DataError(
            f"{options.output_dir} holds rounds with other options: {'; '.join(differing.values())}. Give them as they "
            "were, or take another output_dir"
        )
    if options.objective.uses_reward and not section.replay and not section.trains_head:
        log.warn(
            "rounds.replay is 0 and the ranked answers do not train the reward head: the body moves under a head that "
            "gets no gradient"
        )
    claim_folder(options.output_dir, content)
    write_whole(file, json.dumps(current, indent=2).encode())


def refuse_too_few(options: RoundsOptions) -> None:
    """Raises DataError if no training can fit the combined judge that ranks the round after it."""
    name, sources = next(iter(options.data.eval.items()))
    rows = rows_of_pairs(sources, options.data.cache_dir, options.evaluation.max_pairs)
    if problem := too_few([key_of(row["prompt"]) for row in rows for _ in row["comparisons"]]):
        raise DataError(f"rounds.judge is combined, but of the first set of data.eval, {name}, {problem}")


def at_revision(options: RoundsOptions, processes: Processes) -> RoundsOptions:
    """The options with the folder of a start that is a revision on the hub, for all that open it by its name."""
    if options.model.revision is None:
        return options
    folder = processes.from_first("start", lambda: str(local_folder(options.model)))
    model = options.model.model_copy(update={"name_or_path": folder, "revision": None})
    return options.model_copy(update={"model": model})


def run_rounds(options: RoundsOptions, train_script: Path, processes: Processes) -> None:
    """Run the rounds that are not done yet. All processes call this together.

    Args:
        train_script: launch/train.py, which each training is a run of.

    Raises:
        DataError, ModelError: prompts, models or rewards cannot be used. Stopped: the same command resumes it.
    """
    log, options = Console(processes), at_revision(options, processes)
    processes.from_first("claim", lambda: claim_rounds(options, log))
    with starter(train_script, processes) as start:
        Rounds(options, start, processes, log).run()
    leave_together(processes)
