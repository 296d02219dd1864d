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
from hafrm_ds.evaluation.best_of_n.ranking import RANKED_FILE, rank, read_lines
from hafrm_ds.evaluation.policies import Measuring, measure_policy
from hafrm_ds.evaluation.report.reading import METRICS_FILE, read_rows
from hafrm_ds.evaluation.report.writing import leave_report
from hafrm_ds.evaluation.round_tables import ROUNDS_FILE, render_rounds
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import Saved, base_of, open_model
from hafrm_ds.scoring.rows import json_line
from hafrm_ds.training.compare import Start, is_finished, starter, train_one
from hafrm_ds.training.rounds.options import RoundsOptions, identity_of
from hafrm_ds.training.rounds.pairs import mixed, pairs_of, refuse_held_out

PAIRS_FILE, FACTS_FILE, MEASURED_FILE = "pairs.jsonl", "facts.json", "measures.json"
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
            max_tokens_per_micro_batch=self.max_tokens,
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
            reference=base_of(open_start(self.options)) if section.is_own and section.judge == "implicit" else None,
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
        scores = [[each["score"] for each in line["candidates"]] for line in ranked]
        facts = {
            "ranked_prompts": len(ranked),
            "pairs": len(rows),
            "left_out": dict(left_out),
            "reward": float(np.mean([np.mean(each) for each in scores])),
            "reward_of_best": float(np.mean([max(each) for each in scores])),
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
        folder, section = self.folder(number) / "measured", self.options.rounds
        file = folder / MEASURED_FILE
        if self.processes.from_first(f"is measured {number}", file.exists):
            return
        how = Measuring(
            start=self.model(0),
            prompts=section.evaluation_prompts,
            gold=section.gold,
            max_new_tokens=section.max_new_tokens,
            max_tokens=self.max_tokens,
            seed=self.options.seed * SEEDS_OF_A_RUN,
            loading={
                "chat_template": self.options.data.chat_template,
                "trust_remote_code": self.options.model.trust_remote_code,
            },
        )
        with self.timed(number, "measuring"):
            found = measure_policy(
                folder, self.model(number), how, self.processes.for_job(f"measured {number}"), self.log
            )
        if found is not None:
            write_whole(file, json.dumps(found.to_json(), indent=2).encode())

    @property
    def max_tokens(self) -> int:
        budget = self.options.batch.max_tokens_per_micro_batch
        return 8192 if budget == "auto" else budget

    def timed(self, number: int, stage: str) -> "Timed":
        return Timed(self.folder(number) / "seconds.json", stage, self.processes)

    def write_results(self, last: int) -> None:
        """rounds.json of the rounds so far, the table and the page."""
        rounds = [self.row(number) for number in range(last + 1)]
        results = {
            "reward": self.options.rounds.reward or f"the model that a round starts from ({self.options.rounds.judge})",
            "gold": self.options.rounds.gold,
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
        # The first evaluation of the first training is of the model that it starts from.
        run, place = (number, -1) if number else (1, 0)
        rows = [row for row in read_rows(self.folder(run) / "run" / METRICS_FILE) if row["kind"] == "eval"]
        accuracy = {}
        for name in self.options.data.eval:
            of_set = [row for row in rows if row["set"] == name]
            if of_set and (number or of_set[0]["step"] == 0):
                found = {judge: of_set[place].get(f"accuracy/{judge}") for judge in ("reward", "implicit", "combined")}
                accuracy[name] = {judge: value for judge, value in found.items() if value is not None}
        seconds = folder / "seconds.json"
        return {
            "round": number,
            "model": self.model(number),
            **json.loads((folder / "measured" / MEASURED_FILE).read_text()),
            **facts,
            "accuracy": accuracy,
            "seconds": json.loads(seconds.read_text()) if seconds.exists() else {},
        }


@dataclass
class Timed:
    """Adds the seconds of a stage to a file, also those of an earlier start that was killed behind it."""

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


def claim_rounds(options: RoundsOptions) -> None:
    """Claim the folder, before anything is computed.

    Raises:
        DataError: it holds other rounds, or a prompt of the rounds is one that they are held against. ModelError: the
            start cannot rank its own answers.
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
    refuse_held_out(section, options.data.eval, options.data.cache_dir)
    claim_folder(options.output_dir, identity_of(options))


def run_rounds(options: RoundsOptions, train_script: Path, processes: Processes) -> None:
    """Run the rounds that are not done yet. All processes call this together.

    Args:
        train_script: launch/train.py, which each training is a run of.

    Raises:
        DataError, ModelError: prompts, models or rewards cannot be used. Stopped: the same command resumes it.
    """
    log = Console(processes)
    processes.from_first("claim", lambda: claim_rounds(options))
    with starter(train_script, processes) as start:
        Rounds(options, start, processes, log).run()
    leave_together(processes)
