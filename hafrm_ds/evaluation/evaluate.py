"""An evaluation from model and data to evaluation.json, on any number of processes; one that was killed resumes.

sources -> pairs -> scores of every pair (and of the reference) -> OUTPUT/evaluation/SET.parquet -> evaluation.json
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError, in_own_names
from hafrm_ds.evaluation.analysis import analyse, check
from hafrm_ds.evaluation.attributes import measure_attributes
from hafrm_ds.evaluation.combined import CombinedJudge, too_few
from hafrm_ds.evaluation.figures import render_evaluation
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.pair_scores import EVALUATION_FILE, SCORES_FOLDER, PairScores
from hafrm_ds.evaluation.questions import EvaluatedBenchmark, read_benchmarks
from hafrm_ds.evaluation.results import hash_of, leave_results
from hafrm_ds.evaluation.scoring import AskedItems, score_parts
from hafrm_ds.evaluation.sets import EvaluatedSet, pair_sets, prepare_sets, stored_reference
from hafrm_ds.objective import JudgeFit, attribute_heads, judges
from hafrm_ds.processes.agreement import environment
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import (
    BASE,
    Saved,
    check_both_heads,
    identity_of_model,
    judge_of,
    open_model,
    open_reference,
    trained_beta,
)
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.saved.writing import METADATA_FILE

REASONS_SHOWN = 5


ScoresOfItems = tuple[list[np.ndarray], list[np.ndarray] | None]
"""For each item [responses, heads] of the model; [responses, 1] log-probs of the reference, where there is one."""
Scores = dict[str, ScoresOfItems]
"""By the name of a set or benchmark."""


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on what. Build it with `open`.

    judged: the one set, by its name, that the combined judge is fitted on; {}: its saved fit is used, if there is one.
    stored: reference log-probs [R] of the responses of sets that the store of the training has whole, named as by
    `pair_sets`; on other processes than the first [0].
    beta: scale of the implicit reward.
    """

    options: EvaluationOptions
    saved: Saved
    reference: SavedPolicy | None
    formatter: ChatFormatter
    sets: dict[str, EvaluatedSet]
    judged: dict[str, EvaluatedSet]
    stored: dict[str, np.ndarray]
    benchmarks: dict[str, EvaluatedBenchmark]
    beta: float

    @classmethod
    def open(cls, options: EvaluationOptions, processes: Processes, log: Console) -> "Evaluation":
        """Open the models without their weights, and read and tokenise the data. All processes call this together.

        Raises:
            ConfigError, DataError, ModelError: what was asked for cannot be evaluated.
        """
        saved = open_model(options.model, **options.loading)
        if options.fit_judge:
            check_both_heads(saved)
        against = options.reference or (BASE if options.fit_judge and options.reference_store is None else None)
        reference = None if against is None else open_reference(against, saved, **options.loading)
        try:
            formatter = saved.formatter()
        except ModelError as error:
            raise ModelError(in_own_names(error)) from error
        prepare = partial(prepare_sets, options=options, saved=saved, formatter=formatter, log=log)
        judged = prepare(options.fit_judge, processes=processes.for_job("judge"))
        for name, each in judged.items():
            if problem := too_few(each.prompts):
                raise DataError(f"--fit_judge {name}: {problem}; give more pairs")
        sets = prepare(options.data, processes=processes)
        stored = stored_reference(options, saved, pair_sets(sets, judged), processes, log)
        if reference is None and not pair_sets({}, judged).keys() <= stored.keys():
            raise DataError("the reference store does not have all pairs of --fit_judge; give --reference base besides")
        if reference is None and not stored and "judge" in saved.metadata and len(saved.heads) == 2:
            log.print("the model has a combined judge, which needs a reference: --reference base adds it")
        return cls(
            options,
            saved,
            reference,
            formatter,
            sets,
            judged,
            stored,
            read_benchmarks(options, saved, formatter, processes),
            options.beta or trained_beta(saved),
        )

    def identity(self) -> dict[str, Any]:
        """What the results depend on: those of another job never mix with these."""

        def contents(sets: dict[str, EvaluatedSet]) -> dict[str, list[Any]]:
            return {
                name: [each.groups.fingerprint, hash_of(each.groups.rows["source"][:]), len(each)]
                for name, each in sets.items()
            }

        return {
            "model": identity_of_model(self.saved),
            "reference": None if self.reference is None else identity_of_model(self.reference),
            "template": self.formatter.fingerprint,
            "pairs": contents(self.sets),
            **({"fit_judge": contents(self.judged)} if self.judged else {}),
            **({"stored": list(self.stored)} if self.stored else {}),
            "questions": {
                name: hash_of([each.conversations(), [asdict(question) for question in each.questions]])
                for name, each in self.benchmarks.items()
            },
            "beta": self.options.beta,
            "max_tokens_per_micro_batch": self.options.max_tokens_per_micro_batch,
        }

    @property
    def heads(self) -> tuple[str, ...]:
        """What the model is asked, its attributes last."""
        return (*self.saved.heads, *attribute_heads(self.saved.attributes))

    def score(self, folder: Path, processes: Processes, log: Console) -> Scores:
        """Score all sets and benchmarks by the model and the reference, but for the parts that `folder` has. All
        processes call this together; the first gets the scores."""
        asked: dict[str, AskedItems] = dict(pair_sets(self.sets, self.judged))
        asked |= {f"benchmark {name}": each.groups for name, each in self.benchmarks.items()}

        ask = partial(
            score_parts,
            folder=folder,
            processes=processes,
            log=log,
            deepspeed=self.options.deepspeed,
            max_tokens=self.options.max_tokens_per_micro_batch,
        )
        values = ask("scoring", self.saved, self.heads, asked)
        sets = pair_sets(self.sets, self.judged)
        references = {name: sets[name].by_group(each[:, None]) for name, each in self.stored.items() if len(each)}
        if self.reference is not None:
            missing = {name: each for name, each in asked.items() if name not in self.stored}
            references |= ask("reference", self.reference, ("logprob",), missing)
        return {name: (each, references.get(name)) for name, each in values.items()}

    def results(self, scores: Scores, processes: Processes) -> dict[str, Any]:
        """What evaluation.json says. The scores of the sets are left in output_dir, and with save_judge the fit of the
        combined judge in the model."""
        judge = self.combined_judge(scores)
        found: dict[str, Any] = {
            "model": self.options.model,
            "reference": None if self.reference is None else str(self.reference.folder),
            "beta": self.beta,
            **({} if judge is None else {"judge": judge.fit.to_json()}),
            "sets": {name: self.analyse_set(name, scores, judge) for name in self.sets},
            "benchmarks": {name: self.judge_benchmark(name, scores, judge) for name in self.benchmarks},
            "data": {name: each.groups.report.to_json() for name, each in self.sets.items()},
            "environment": environment(processes.world_size, processes.device),
        }
        if self.options.save_judge and judge is not None:
            save_judge(self.saved.folder, judge.fit)
        return found | {"job": self.identity()}  # of the model as it is now

    def combined_judge(self, scores: Scores) -> CombinedJudge | None:
        """Both heads as one judge, by the fit that was asked for or the one that is saved with the model."""
        if self.judged:
            [(name, evaluated)] = self.judged.items()
            pair_scores = self.scores_of_set(name, evaluated, scores[f"judge {name}"])
            check(pair_scores)
            return CombinedJudge.fitted_on(pair_scores)
        has_reference = self.reference is not None or self.stored
        if not has_reference or "judge" not in self.saved.metadata or len(self.saved.heads) < 2:
            return None
        return CombinedJudge(judge_of(self.saved))

    def scores_of_set(self, name: str, evaluated: EvaluatedSet, scores: ScoresOfItems) -> PairScores:
        values, references = scores
        return PairScores.of(
            name,
            evaluated.groups,
            evaluated.index,
            dict(zip(self.saved.heads, np.concatenate(values).T)),
            None if references is None else np.concatenate(references)[:, 0],
            beta=self.beta,
            step=self.saved.metadata.get("training", {}).get("steps"),
        )

    def analyse_set(self, name: str, scores: Scores, judge: CombinedJudge | None) -> dict[str, Any]:
        evaluated = self.sets[name]
        pair_scores = self.scores_of_set(name, evaluated, scores[f"set {name}"])
        if judge is not None:
            judge.judge(pair_scores)
        analysis, values = analyse(pair_scores), dict(zip(self.heads, np.concatenate(scores[f"set {name}"][0]).T))
        measured = measure_attributes(evaluated.groups, evaluated.index, values, self.saved.attributes)
        analysis |= {"attributes": measured} if measured else {}
        pair_scores.keep_texts(evaluated.groups, evaluated.index, self.formatter.tokenizer)
        pair_scores.save(self.options.output_dir / SCORES_FOLDER)
        return analysis

    def judge_benchmark(self, name: str, scores: Scores, judge: CombinedJudge | None) -> dict[str, Any]:
        """{"cut": questions whose prompt was truncated, "left_out": questions that were not asked, "why_left_out": the
        reasons of the first of these, "judges": judge -> result of the benchmark}."""
        evaluated = self.benchmarks[name]
        values, references = scores[f"benchmark {name}"]
        rows: dict[str, list[list[float]]] = {}
        fit = None if judge is None else judge.fit
        for place, of_heads in enumerate(values):
            known = dict(zip(self.saved.heads, of_heads.T))
            reference = None if references is None else references[place][:, 0]
            for by, each in judges(known.get("reward"), known.get("logprob"), reference, self.beta, fit).items():
                rows.setdefault(by, []).append(each.tolist())
        results = {by: evaluated.benchmark.summarize(evaluated.questions, each) for by, each in rows.items()}
        if evaluated.missing_share > self.options.max_missing_share:
            results = {by: result | {"score": None} for by, result in results.items()}
        left_out = evaluated.left_out
        return {
            "cut": evaluated.num_cut,
            "left_out": len(left_out),
            "why_left_out": left_out[:REASONS_SHOWN],
            "judges": results,
        }


def evaluate(options: EvaluationOptions, processes: Processes) -> None:
    """Evaluate a model on sets of pairs and on benchmarks. All processes call this together.

    Leaves in output_dir: evaluation.json, evaluation/SET.parquet with the scores of every pair, report.html.

    Raises:
        ConfigError, DataError, ModelError: what was asked for cannot be evaluated.
    """
    log = Console(processes)
    evaluation = Evaluation.open(options, processes, log)

    def results(folder: Path) -> dict[str, Any] | None:
        scores = evaluation.score(folder, processes, log)
        return evaluation.results(scores, processes) if processes.is_first else None

    leave_results(options.output_dir / EVALUATION_FILE, render_evaluation, evaluation.identity, results, processes, log)


def save_judge(folder: Path, fit: JudgeFit) -> None:
    """Put the combined judge into the hafrm.json of a model, in place of the one that is there."""
    file = folder / METADATA_FILE
    metadata = json.loads(file.read_text()) | {"judge": fit.to_json()}
    write_whole(file, (json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode())
