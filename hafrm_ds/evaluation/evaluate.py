"""An evaluation from model and data to evaluation.json, on any number of processes; one that was killed resumes.

sources -> pairs -> scores of every pair (and of the reference) -> OUTPUT/evaluation/SET.parquet -> evaluation.json
"""

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field

from hafrm_ds.config import Positive, PositiveInt, ScoringSection, Share
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.preparation import PreparationOptions, PreparedPairs, fingerprint, prepare_pairs
from hafrm_ds.data.sources import EvalSources, suggestion
from hafrm_ds.data.tokenization import PromptWithResponses, tokenize_conversation
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError, in_own_names
from hafrm_ds.evaluation.analysis import analyse, check
from hafrm_ds.evaluation.benchmarks.benchmark import Benchmark, Question
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hafrm_ds.evaluation.combined import FEWEST_PROMPTS, CombinedJudge
from hafrm_ds.evaluation.figures import render_evaluation
from hafrm_ds.evaluation.pair_scores import EVALUATION_FILE, SCORES_FOLDER, PairScores, fixed_choice
from hafrm_ds.evaluation.report.writing import leave_report
from hafrm_ds.evaluation.scoring import AskedItems, score_parts
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.objective import JudgeFit, judges
from hafrm_ds.processes.agreement import environment
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.reference.store import Namespace, ReferenceStore
from hafrm_ds.saved.opening import (
    BASE,
    Saved,
    check_both_heads,
    identity_of_model,
    judge_of,
    open_model,
    open_reference,
    trained_beta,
    trained_with,
)
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.saved.writing import METADATA_FILE

PARTS_FOLDER = "parts"
DEFAULT_TRUNCATION = "keep_prompt_end"
REASONS_SHOWN = 5


def benchmarks_of(words: Any) -> Any:
    """NAME or NAME=PATH, one or a list of them -> where each benchmark lies; None: on the hub."""
    if isinstance(words, dict):
        return words
    found: dict[str, str | None] = {}
    for word in words if isinstance(words, list) else [words]:
        name, _, path = str(word).partition("=")
        if name in found:
            raise ValueError(f"names {name} twice; evaluate the second into another --output_dir")
        found[name] = path or None
    return found


def known_benchmarks(found: dict[str, str | None]) -> dict[str, str | None]:
    for name in found:
        if name not in BENCHMARKS:
            raise ValueError(f"{name} is not known{suggestion(name, BENCHMARKS)} (known: {', '.join(BENCHMARKS)})")
    return found


class EvaluationOptions(ScoringSection):
    """The options of launch/evaluate.py."""

    model: str
    """Folder or hub id."""
    output_dir: Path
    """Where the results go."""
    data: EvalSources = Field(default={})
    """One or more sources, each of which is a set, or '{NAME: SOURCE, ...}' to name the sets."""
    benchmarks: Annotated[dict[str, str | None], BeforeValidator(benchmarks_of), AfterValidator(known_benchmarks)] = (
        Field({}, description=f"Of {', '.join(BENCHMARKS)}: NAME takes it from the hub, NAME=PATH from there.")
    )
    reference: str | None = None
    """Policy that the implicit reward is measured against: a folder, a hub id, or base: what the training started from.
    """
    reference_store: Path | None = None
    """The store of the training's reference log-probs (its reference.store). Sets of which it has every pair need no
    forward of the reference, and no weights of it."""
    fit_judge: EvalSources = Field(default={})
    """Pairs to fit the combined judge on: what either head of the model counts. Those that --data has too are judged
    fold by fold. Default: the fit that is saved with the model. The default of --reference is then base."""
    save_judge: bool = False
    """Put the fit of --fit_judge into hafrm.json of the model, for whatever scores with it later."""
    beta: Positive | None = None
    """Scale of the implicit reward. Default: that of the training, else 0.1."""
    max_pairs: PositiveInt | None = None
    """Use at most this many pairs of each set: a fixed random choice."""
    max_length: PositiveInt | None = None
    """Longest conversation in tokens. Default: that of the training, else what the model knows and a micro-batch holds.
    """
    truncation: Literal["drop", "keep_prompt_end", "cut_response"] | None = None
    """What happens to longer ones. Default: as in the training, else keep_prompt_end."""
    max_dropped_share: Share | None = None
    """Stop when a larger share of the pairs would be dropped. Default: 0.05."""
    cache_dir: Path | None = None
    """Where prepared data is kept between runs. Default: the cache folder of Hugging Face datasets."""
    misfits: Literal["leave_out", "cut"] = "leave_out"
    """Questions of a benchmark with an answer that leaves no room for its prompt. leave_out: they are not asked, and
    counted. cut: their answers lose their end. Questions that the chat template cannot render are left out."""
    max_missing_share: Share = 0.05
    """A benchmark has no overall score when a larger share of its questions is left out."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON: shard the model over the processes."""

    def contradictions(self) -> list[str]:
        problems = []
        if not (self.data or self.benchmarks or self.fit_judge):
            problems.append("neither --data nor --benchmarks was given: there is nothing to evaluate on")
        if len(self.fit_judge) > 1:
            problems.append("--fit_judge takes one set; several sources of one are '{NAME: [SOURCE, SOURCE]}'")
        if self.reference_store is not None and self.reference not in (None, BASE):
            problems.append("--reference_store is of what the training started from: give --reference base, or neither")
        if self.save_judge and not self.fit_judge:
            problems.append("--save_judge true saves the fit of --fit_judge, which is not given")
        if self.save_judge and not Path(self.model).is_dir():
            problems.append(f"--save_judge true writes into the folder of the model, and {self.model} is none")
        return problems


@dataclass(frozen=True)
class EvaluatedSet:
    """Pairs of a set, and the positions [P] of those that are scored."""

    pairs: PreparedPairs
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> list[PromptWithResponses]:
        return [self.pairs[int(self.index[place])].group]


@dataclass(frozen=True)
class EvaluatedBenchmark:
    """Questions of a benchmark, and the groups of each: its responses in order, with their prompt (`encode_question`).
    num_cut: of these lost the start of their prompt, or the end of an answer. left_out: why questions are not among
    them, one text for each."""

    benchmark: Benchmark
    questions: list[Question]
    groups: list[list[PromptWithResponses]]
    num_cut: int
    left_out: list[str]

    @property
    def missing_share(self) -> float:
        return len(self.left_out) / (len(self.left_out) + len(self.questions))

    def conversations(self) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
        """Prompt and response of every conversation, question by question."""
        return [
            [(group.prompt, response) for group in groups for response in group.responses] for groups in self.groups
        ]


ScoresOfItems = tuple[list[np.ndarray], list[np.ndarray] | None]
"""For each item [responses, heads] of the model; [responses, 1] log-probs of the reference, where there is one."""
Scores = dict[str, ScoresOfItems]
"""By the name of a set or benchmark."""


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on what. Build it with `open`.

    judged: the one set, by its name, that the combined judge is fitted on; {}: its saved fit is used, if there is one.
    stored: reference log-probs [P, 2] of the sets that the store of the training has whole, named as by `pair_sets`; on
    other processes than the first [0, 2].
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
            if (num_prompts := len(np.unique(each.pairs.prompt_keys[each.index]))) < FEWEST_PROMPTS:
                raise DataError(
                    f"--fit_judge {name} has {num_prompts} prompts, and the combined judge is fitted on "
                    f"{FEWEST_PROMPTS} or more: give more pairs"
                )
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
                name: [fingerprint(each.pairs), hash_of(each.pairs.pairs["source"][:]), len(each)]
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
        values = ask("scoring", self.saved, self.saved.heads, asked)
        references = {name: list(each[:, :, None]) for name, each in self.stored.items()}
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
            "data": {name: each.pairs.report.to_json() for name, each in self.sets.items()},
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
            evaluated.pairs,
            evaluated.index,
            dict(zip(self.saved.heads, np.moveaxis(np.stack(values), 2, 0))),
            None if references is None else np.stack(references)[:, :, 0],
            beta=self.beta,
            step=self.saved.metadata.get("training", {}).get("steps"),
        )

    def analyse_set(self, name: str, scores: Scores, judge: CombinedJudge | None) -> dict[str, Any]:
        evaluated = self.sets[name]
        pair_scores = self.scores_of_set(name, evaluated, scores[f"set {name}"])
        if judge is not None:
            judge.judge(pair_scores)
        analysis = analyse(pair_scores)
        pair_scores.keep_texts(evaluated.pairs, evaluated.index, self.formatter.tokenizer)
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
    file, folder = options.output_dir / EVALUATION_FILE, options.output_dir / PARTS_FOLDER
    if processes.from_first("state", lambda: claim_output(file, folder, evaluation.identity())) == "finished":
        log.print(f"{file} is there already, for this model and data")
    else:
        scores = evaluation.score(folder, processes, log)
        if processes.is_first:
            results = evaluation.results(scores, processes)
            write_whole(file, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False).encode())
    if processes.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        log.print(render_evaluation(json.loads(file.read_text())))
        log.print(f"the results are in {options.output_dir}")
        leave_report(options.output_dir, log)
    leave_together(processes)


def save_judge(folder: Path, fit: JudgeFit) -> None:
    """Put the combined judge into the hafrm.json of a model, in place of the one that is there."""
    file = folder / METADATA_FILE
    metadata = json.loads(file.read_text()) | {"judge": fit.to_json()}
    write_whole(file, (json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode())


def hash_of(content: Any) -> str:
    """SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def claim_output(file: Path, folder: Path, identity: dict[str, Any]) -> str:
    """ "finished" or "open"; raises DataError if evaluation.json is of another evaluation."""
    if not file.exists():
        claim_folder(folder, identity)
        return "open"
    try:
        same = json.loads(file.read_text())["job"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(f"{file} holds another evaluation; choose another --output_dir")
    return "finished"


# ---- what is evaluated ---------------------------------------------------------------------------------------------


def prepare_sets(
    data: EvalSources,
    *,
    options: EvaluationOptions,
    saved: Saved,
    formatter: ChatFormatter,
    processes: Processes,
    log: Console,
) -> dict[str, EvaluatedSet]:
    """Read and tokenise the pairs of every set, as the model was trained unless the options say otherwise."""
    defaults = {"max_length": longest_conversation(options, saved), "truncation": DEFAULT_TRUNCATION}
    trained = trained_with(saved, "data")
    given = {name: trained.get(name, default) for name, default in defaults.items()}
    given["max_length"] = int(min(given["max_length"], sizes_of(saved).positions))
    asked = {name: getattr(options, name) for name in (*defaults, "max_dropped_share", "cache_dir")}
    given |= {name: value for name, value in asked.items() if value is not None}
    if given["max_length"] > options.max_tokens_per_micro_batch:
        raise DataError(
            f"conversations of up to {given['max_length']:,} tokens (--max_length) do not fit "
            f"--max_tokens_per_micro_batch {options.max_tokens_per_micro_batch:,}"
        )
    preparation = PreparationOptions(**given)
    sets = {}
    for name, sources in data.items():
        read = partial(prepare_pairs, sources, formatter=formatter, options=preparation, role="eval", seed=0)
        try:
            sets[name] = processes.in_turns(f"data {name}", read)
            sizes_of(saved).check({name: sets[name]}, formatter.tokenizer)
        except (DataError, ModelError) as error:  # it names the options of a training
            raise type(error)(in_own_names(error)) from error
        log.print(f"\n[bold]{name}[/bold]")
        log.print(sets[name].report.render(with_examples=False))
    return {name: EvaluatedSet(pairs, fixed_choice(len(pairs), options.max_pairs)) for name, pairs in sets.items()}


def pair_sets(sets: dict[str, EvaluatedSet], judged: dict[str, EvaluatedSet]) -> dict[str, EvaluatedSet]:
    """The sets that are evaluated and the one that the judge is fitted on, by names that no two share."""
    return {f"set {name}": each for name, each in sets.items()} | {
        f"judge {name}": each for name, each in judged.items()
    }


def stored_reference(
    options: EvaluationOptions,
    saved: Saved,
    asked: dict[str, EvaluatedSet],
    processes: Processes,
    log: Console,
) -> dict[str, np.ndarray]:
    """`Evaluation.stored`, of the sets that are asked for. All processes call this together; the first reads the store.

    Raises:
        DataError: the store has none of these weights in the dtype of the model, or the model does not say which they
            are.
    """
    if options.reference_store is None:
        return {}
    start = saved.metadata.get("base", {}).get("namespace")
    if start is None:
        raise DataError(
            f"{saved.folder} does not say what its reference log-probs are stored under, as models of older trainings "
            "do not: leave out --reference_store"
        )
    namespace, root = Namespace(**start), options.reference_store
    if namespace.dtype != saved.config.dtype or not (root / namespace.name).is_dir():
        raise DataError(
            f"--reference_store {root} has no log-probs in {saved.config.dtype} of the weights that {saved.folder} "
            f"started from ({namespace.name})"
        )
    found: dict[str, np.ndarray] = {}
    if processes.is_first:
        store = ReferenceStore(root, namespace, warn=log.warn)
        values = {name: store.logprobs(each.pairs.keys[each.index].reshape(-1)) for name, each in asked.items()}
        found = {name: each.reshape(-1, 2) for name, each in values.items() if not np.isnan(each).any()}
        for name in asked.keys() - found.keys():
            missing = int(np.isnan(values[name]).sum())
            log.print(f"{name}: the reference store lacks {missing:,} of {len(values[name]):,} log-probs")
    names = json.loads(processes.from_first("stored reference", lambda: json.dumps(list(found))))
    return found or {name: np.empty((0, 2), dtype=np.float32) for name in names}


def longest_conversation(options: EvaluationOptions, saved: Saved) -> int:
    """Tokens that the model knows and a micro-batch holds."""
    return int(min(options.max_tokens_per_micro_batch, sizes_of(saved).positions))


def sizes_of(saved: Saved) -> ModelSizes:
    return ModelSizes.of(str(saved.folder), load_model_config(saved.config))


def read_benchmarks(
    options: EvaluationOptions, saved: Saved, formatter: ChatFormatter, processes: Processes
) -> dict[str, EvaluatedBenchmark]:
    """Read and tokenise the questions of every benchmark that was asked for.

    Raises:
        DataError, ModelError: none of its questions can be asked, or the model has no embedding for their tokens.
    """
    sizes = sizes_of(saved)
    max_length = int(min(options.max_length or math.inf, longest_conversation(options, saved)))
    found = {}
    for name, path in options.benchmarks.items():
        benchmark = BENCHMARKS[name]
        read = partial(benchmark.read, path or benchmark.default_path, None)
        questions = processes.in_turns(f"benchmark {name}", read)
        asked, encoded, left_out = [], [], []
        for each in questions:
            try:
                groups = encode_question(
                    formatter, each.id, each.prompt, each.responses, max_length, cut_answers=options.misfits == "cut"
                )
            except DataError as error:
                left_out.append(str(error))
                continue
            asked.append(each)
            encoded.append(groups)
        if not asked:
            raise DataError(f"no question of {benchmark.title} can be asked, the first because {left_out[0]}")
        sequences = (ids for groups, _ in encoded for group in groups for ids in (group.prompt, *group.responses))
        sizes.check_ids(sequences, formatter.tokenizer)
        num_cut = sum(was_cut for _, was_cut in encoded)
        found[name] = EvaluatedBenchmark(benchmark, asked, [ids for ids, _ in encoded], num_cut, left_out)
    return found


def encode_question(
    formatter: ChatFormatter,
    place: str,
    prompt: list[Message],
    responses: list[list[Message]],
    max_length: int,
    cut_answers: bool = False,
) -> tuple[list[PromptWithResponses], bool]:
    """The groups of a question: its responses in order, and whether anything was truncated.

    They are one group, or several where the tokenizer merges the first token of some responses with the prompt's last.

    A conversation of more than `max_length` tokens loses the start of its prompt, as data.truncation keep_prompt_end
    does it: a leading BOS stays. All answers keep the same prompt, truncated for the longest.

    Args:
        cut_answers: an answer that is too long by itself loses its end, beside the last token of the prompt.

    Raises:
        DataError: naming `place`, for a conversation that cannot be rendered, or an answer that is too long by itself.
    """
    try:
        conversations = [tokenize_conversation(formatter, [*prompt, *response]) for response in responses]
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    excess = max(ids.longest_conversation for ids in conversations) - max_length
    if excess <= 0:
        return groups_of(conversations), False
    has_bos = conversations[0].prompt[0] == formatter.tokenizer.bos_token_id
    kept = conversations[0].prompt[:1] if has_bos else []
    if excess > min(len(ids.prompt) for ids in conversations) - len(kept) - 1:
        if cut_answers and max_length > len(kept) + 1:
            room = max_length - len(kept) - 1
            cut = [PromptWithResponses([*kept, *ids.prompt[-1:]], (ids.responses[0][:room],)) for ids in conversations]
            return groups_of(cut), True
        raise DataError(
            f"{place}: an answer leaves no room for its prompt in {max_length:,} tokens, the least of --max_length, "
            "--max_tokens_per_micro_batch and the positions that the model knows"
        )
    truncated = [ids._replace(prompt=[*kept, *ids.prompt[len(kept) + excess :]]) for ids in conversations]
    return groups_of(truncated), True


def groups_of(conversations: list[PromptWithResponses]) -> list[PromptWithResponses]:
    """Groups of one response -> neighbours with the same prompt put together, in order."""
    return [
        PromptWithResponses(prompt, tuple(response for _, responses in members for response in responses))
        for prompt, members in itertools.groupby(conversations, key=lambda ids: ids.prompt)
    ]
