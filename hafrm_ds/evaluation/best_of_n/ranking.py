"""Best-of-N from candidates to results, in stages that each leave a whole file and are passed over when it is there.

OUTPUT/candidates.jsonl      given, or sampled (best_of_n.sampling)
OUTPUT/scores-K.jsonl        by the K-th model; gold.jsonl by the gold scorer (scoring.files)
OUTPUT/ranked.jsonl          a line for each prompt and model: the candidates, best first
OUTPUT/best_of_n.json        means over the prompts (best_of_n.statistics)
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from hafrm_ds.data.files import file_table
from hafrm_ds.data.pairs import Row
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.evaluation.best_of_n.figures import render_best_of_n
from hafrm_ds.evaluation.best_of_n.options import RankingOptions
from hafrm_ds.evaluation.best_of_n.sampling import SAMPLING_FILE, SamplingJob
from hafrm_ds.evaluation.best_of_n.statistics import compare_with_gold
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together, stamp
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import is_model
from hafrm_ds.saved.opening import Judge, open_model
from hafrm_ds.scoring.files import ScoringOptions, score_file
from hafrm_ds.scoring.rows import conversations_of, json_line, prompt_as_written

CANDIDATES_FILE, GOLD_FILE, RANKED_FILE = "candidates.jsonl", "gold.jsonl", "ranked.jsonl"
RESULTS_FILE = "best_of_n.json"


@dataclass(frozen=True)
class RankedPrompt:
    """A line of candidates.jsonl with what the models say of it.

    scores: model -> [N]; gold: [N], or None without a gold scorer.
    """

    fields: dict[str, Any]
    scores: dict[str, np.ndarray]
    gold: np.ndarray | None

    @property
    def name(self) -> str:
        return json.dumps(self.fields["prompt"])

    def lines(self) -> list[bytes]:
        return [json_line(self.ranking(model)) for model in self.scores]

    def ranking(self, model: str) -> dict[str, Any]:
        """The candidates, best first. Those with the same score share a rank and keep their order."""
        scores = self.scores[model]
        candidates = []
        for place in np.argsort(-scores, kind="stable"):
            rank = 1 + int((scores > scores[place]).sum())
            candidate = {"response": self.fields["responses"][place], "score": float(scores[place]), "rank": rank}
            if "ended" in self.fields:
                candidate["ended"] = self.fields["ended"][place]
            if self.gold is not None:
                candidate["gold"] = float(self.gold[place])
            candidates.append(candidate)
        kept = {"id": self.fields["id"], "prompt": self.fields["prompt"]}
        return kept | {"model": model, "pick": candidates[0]["response"], "candidates": candidates}


def rank(options: RankingOptions, processes: Processes) -> int:
    """Rank candidates; returns how many prompts could not be scored. All processes call this together.

    Raises:
        ConfigError: options that contradict themselves. DataError, ModelError: files or models cannot be used.
    """
    log = Console(processes)
    folder = options.output_dir
    candidates = folder / CANDIDATES_FILE
    scorers = {f"scores-{number}.jsonl": model for number, model in enumerate(options.model, start=1)}
    if options.gold is not None:
        scorers[GOLD_FILE] = options.gold
    scorings = {
        file: scoring_of(name, folder / file, options, None if file == GOLD_FILE else options.judge)
        for file, name in scorers.items()
    }
    if options.reference is not None and all(each.reference is None for each in scorings.values()):
        raise ConfigError(
            [
                "--reference is for models without a reward head, and all of these have one; with one it takes --judge "
                "implicit or combined"
            ]
        )
    identity: dict[str, Any] = {
        "models": {file: {"name": name} | identity_of_scorer(scorings[file]) for file, name in scorers.items()},
        "max_tokens_per_micro_batch": options.max_tokens_per_micro_batch,
    }

    if options.candidates is not None:
        processes.from_first("candidates", partial(take_over, options.candidates, candidates, identity))
    elif options.sampling is not None:
        job = SamplingJob.open(options.sampling, **options.loading)
        identity["sampling"] = job.identity()
        if not processes.from_first("claim", lambda: claim(candidates, identity)):
            job.sample(candidates, processes.for_job("sampling"), log)
    for file, name in scorers.items():
        score(name, scorings[file], processes, log)

    num_bad = processes.from_first("results", lambda: write_results(options, scorers, log))
    leave_together(processes)
    return num_bad


def scoring_of(name: str, output: Path, options: RankingOptions, judge: Judge | None) -> ScoringOptions:
    """How a reward scores the candidates: a reward head needs no reference, and a composition names its own judges."""
    if not is_model(name):
        judge, needs_reference = None, False
    elif judge is not None:
        needs_reference = judge != "reward"
    else:
        needs_reference = "reward" not in open_model(name, **options.loading).heads
    return ScoringOptions(
        model=Path(name),
        input=options.output_dir / CANDIDATES_FILE,
        output=output,
        max_tokens_per_micro_batch=options.max_tokens_per_micro_batch,
        judge=judge,
        reference=options.reference if needs_reference else None,
        **options.loading,
    )


def identity_of_scorer(scoring: ScoringOptions) -> dict[str, Any]:
    """What the scores of a model depend on. Of a single one its template is told by its files."""
    identity = scoring.open().identity()
    identity.pop("template", None)
    return identity


def claim(candidates: Path, identity: dict[str, Any]) -> bool:
    """Make the output folder, or resume it; whether the candidates are there already."""
    names = (CANDIDATES_FILE, SAMPLING_FILE, *identity["models"], RANKED_FILE, RESULTS_FILE)
    claim_folder(candidates.parent, identity, makes=[candidates.with_name(name) for name in names])
    return candidates.exists()


# ---- stages --------------------------------------------------------------------------------------------------------


def take_over(file: Path, candidates: Path, identity: dict[str, Any]) -> None:
    """Given candidates -> candidates.jsonl. A file with a fault in it leaves nothing behind."""
    rows = read_candidates(file)
    if not claim(candidates, identity | {"candidates": stamp(file)}):
        write_whole(candidates, b"".join(map(json_line, rows)))


def read_candidates(file: Path) -> list[dict[str, Any]]:
    """Rows of a file -> lines of candidates.jsonl: id, prompt, responses, `ended` where they were sampled before, and,
    if all rows have it, gold.

    Raises:
        DataError: naming the row.
    """
    rows: list[dict[str, Any]] = []
    for number, fields in file_table(file, str(file)).rows():
        row = Row(fields, f"{file}:{number}", "")
        if not isinstance(fields, dict):
            raise row.fault("the row", fields, "an object with prompt and responses")
        responses = row.value("responses")
        if conversations_of(row)[0] != "scores":
            raise row.fault(
                "field 'responses'", responses, "answers to a prompt, or to messages that end with the user"
            )
        kept = {"id": fields.get("id", row.id), "prompt": prompt_as_written(row), "responses": responses}
        num_responses = len(kept["responses"])
        if num_responses < 2:
            raise DataError(f"{row.id}: field 'responses' has 1 answer; a best of N needs 2 at least")
        ended = fields.get("ended")
        if isinstance(ended, list) and len(ended) == num_responses and all(isinstance(each, bool) for each in ended):
            kept["ended"] = ended
        if fields.get("gold") is not None:
            gold = kept["gold"] = fields["gold"]
            if not isinstance(gold, list) or len(gold) != num_responses:
                raise row.fault("field 'gold'", gold, f"a list of {num_responses} numbers, one for each of 'responses'")
            for place, value in enumerate(gold):
                Row({f"gold[{place}]": value}, row.id, "").number(f"gold[{place}]")
        if rows and ("gold" in rows[0]) != ("gold" in kept):
            raise DataError(f"{row.id}: either all rows have a field 'gold' or none; the rows before it do otherwise")
        rows.append(kept)
    if not rows:
        raise DataError(f"--candidates {file} is empty")
    return rows


def score(name: str, scoring: ScoringOptions, processes: Processes, log: Console) -> None:
    """Score the candidates with one model, unless it has been done."""
    output = scoring.output
    parts = output.with_name(f"{output.name}.parts")
    if processes.from_first(f"state of {output.name}", lambda: output.exists() and not parts.exists()):
        return
    log.print(f"scoring with {escape(name)}")
    score_file(scoring, processes.for_job(output.name))


def write_results(options: RankingOptions, scorers: dict[str, str], log: Console) -> int:
    """ranked.jsonl, best_of_n.json and the tables; returns how many prompts could not be scored."""
    folder = options.output_dir
    rows = read_lines(folder / CANDIDATES_FILE)
    found = {file: [row["scores"] for row in read_lines(folder / file)] for file in scorers}
    gold = found.pop(GOLD_FILE, [row.get("gold") for row in rows])
    has_gold = options.gold is not None or "gold" in rows[0]
    prompts = []
    for place, row in enumerate(rows):
        scores = {scorers[file]: values[place] for file, values in found.items()}
        if None in scores.values() or (has_gold and gold[place] is None):
            continue
        as_arrays = {model: np.array(values) for model, values in scores.items()}
        prompts.append(RankedPrompt(row, as_arrays, np.array(gold[place], dtype=float) if has_gold else None))
    num_bad = len(rows) - len(prompts)
    if not prompts:
        raise DataError(f"no prompt of {folder / CANDIDATES_FILE} could be scored; the reasons are in {folder}/*.jsonl")
    write_whole(folder / RANKED_FILE, b"".join(line for prompt in prompts for line in prompt.lines()))
    sizes = [len(prompt.fields["responses"]) for prompt in prompts]
    results: dict[str, Any] = {
        "models": options.model,
        "gold": options.gold or ("field gold" if has_gold else None),
        "prompts": len(prompts),
        "prompts_not_scored": num_bad,
        "candidates": {"fewest": min(sizes), "most": max(sizes)},
    }
    if options.judge is not None:
        results["judge"] = options.judge
    if options.sampling is not None:
        results["sampling"] = json.loads((folder / SAMPLING_FILE).read_text())
    if has_gold:
        scores = {model: [prompt.scores[model] for prompt in prompts] for model in options.model}
        names = [prompt.name for prompt in prompts]
        golds = [prompt.gold for prompt in prompts if prompt.gold is not None]
        results["results"] = compare_with_gold(scores, golds, names)
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / RESULTS_FILE, text.encode())
    log.print(render_best_of_n(results))
    log.print(f"the rankings and results are in {escape(str(folder))}")
    return num_bad


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]
