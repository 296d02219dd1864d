"""An evaluation from model and data to evaluation.json, on any number of processes, killed and started again at will.

sources -> pairs -> scores of every pair (and of the reference) -> OUTPUT/evaluation/SET.parquet -> evaluation.json
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.preparation import PreparationOptions, PreparedPairs, fingerprint, prepare_pairs
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tokenization import ConversationIds, tokenize_conversation
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.benchmarks.benchmark import Benchmark, Question
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hafrm_ds.evaluation.pair_scores import EVALUATION_FILE, SCORES_FOLDER, PairScores, fixed_choice
from hafrm_ds.evaluation.report.writing import leave_report
from hafrm_ds.evaluation.scoring import Group, ModelForGroups, score_groups
from hafrm_ds.evaluation.terminal import render_evaluation
from hafrm_ds.model.loading import known_positions, load_model_config
from hafrm_ds.processes.agreement import environment
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import Saved, identity_of_model, open_model, open_reference, trained_beta, trained_with
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.saved.scorer import DEFAULT_MAX_TOKENS

PARTS_FOLDER = "parts"
DEFAULT_TRUNCATION = "keep_prompt_end"


@dataclass(frozen=True)
class EvaluationOptions:
    """What launch/evaluate.py is asked for; its --help says what each means."""

    model: str
    output_dir: Path
    data: dict[str, list[Source]] = field(default_factory=dict)
    benchmarks: dict[str, str | None] = field(default_factory=dict)
    reference: str | None = None
    beta: float | None = None
    max_pairs: int | None = None
    max_length: int | None = None
    truncation: str | None = None
    max_dropped_share: float | None = None
    chat_template: str | None = None
    dtype: str | None = None
    max_tokens_per_micro_batch: int = DEFAULT_MAX_TOKENS
    deepspeed: Path | None = None
    trust_remote_code: bool = False
    trust_pickle: bool = False

    def problems(self) -> list[str]:
        names = ("beta", "max_pairs", "max_length", "max_tokens_per_micro_batch")
        values = {name: getattr(self, name) for name in names}
        return [
            f"--{name} is {value}; it must be above 0"
            for name, value in values.items()
            if value is not None and value <= 0
        ]

    @property
    def loading(self) -> dict[str, Any]:
        """How a model is opened."""
        names = ("dtype", "chat_template", "trust_remote_code", "trust_pickle")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EvaluatedSet:
    """Pairs of a set, and the positions [P] of those that are scored."""

    pairs: PreparedPairs
    index: np.ndarray

    def conversations(self, item: int) -> list[ConversationIds]:
        pair = self.pairs[int(self.index[item])]
        return [ConversationIds(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]


@dataclass(frozen=True)
class EvaluatedBenchmark:
    """Questions of a benchmark, and the token ids of each with all of its responses. num_cut: of these lost the start
    of their prompt."""

    benchmark: Benchmark
    questions: list[Question]
    ids: list[list[ConversationIds]]
    num_cut: int


@dataclass(frozen=True)
class Scores:
    """Name of a group -> for each item [conversations, heads] of the model; [conversations, 1] log-probs of the
    reference, where there is one."""

    values: dict[str, list[np.ndarray]]
    references: dict[str, list[np.ndarray]]

    def of(self, group: str) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        return self.values[group], self.references.get(group)


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on what. Build it with `open`.

    beta: scale of the implicit reward.
    """

    options: EvaluationOptions
    saved: Saved
    reference: SavedPolicy | None
    formatter: ChatFormatter
    sets: dict[str, EvaluatedSet]
    benchmarks: dict[str, EvaluatedBenchmark]
    beta: float

    @classmethod
    def open(cls, options: EvaluationOptions, processes: Processes, log: Console) -> "Evaluation":
        """Look at the models, and read and tokenise the data. All processes call this together.

        Raises:
            ConfigError, DataError, ModelError: what was asked for cannot be evaluated.
        """
        if problems := options.problems():
            raise ConfigError(problems)
        saved = open_model(options.model, **options.loading)
        reference = None if options.reference is None else open_reference(options.reference, saved, **options.loading)
        formatter = saved.formatter()
        return cls(
            options,
            saved,
            reference,
            formatter,
            prepare_sets(options, saved, formatter, processes, log),
            read_benchmarks(options, saved, formatter, processes),
            options.beta or trained_beta(saved),
        )

    def identity(self) -> dict[str, Any]:
        """What the results depend on: those of another job never mix with these."""
        return {
            "model": identity_of_model(self.saved),
            "reference": None if self.reference is None else identity_of_model(self.reference),
            "template": self.formatter.fingerprint,
            "pairs": {
                name: [fingerprint(each.pairs), hash_of(each.pairs.pairs["source"][:]), len(each.index)]
                for name, each in self.sets.items()
            },
            "questions": {
                name: hash_of([each.ids, [asdict(question) for question in each.questions]])
                for name, each in self.benchmarks.items()
            },
            "beta": self.options.beta,
            "max_tokens_per_micro_batch": self.options.max_tokens_per_micro_batch,
        }

    def score(self, folder: Path, processes: Processes, log: Console) -> Scores:
        """Ask the model and the reference about everything, as far as `folder` does not have the answers. All processes
        call this together; the first gets the scores."""
        groups = [Group(f"set {name}", len(each.index), each.conversations) for name, each in self.sets.items()]
        groups += [
            Group(f"benchmark {name}", len(each.ids), each.ids.__getitem__) for name, each in self.benchmarks.items()
        ]

        def ask(name: str, saved: Saved, heads: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
            model = ModelForGroups(saved, self.options.deepspeed, self.options.max_tokens_per_micro_batch)
            return score_groups(name, model, heads, groups, folder, processes, log)

        values = ask("scoring", self.saved, self.saved.heads)
        return Scores(values, {} if self.reference is None else ask("reference", self.reference, ("logprob",)))

    def results(self, scores: Scores, processes: Processes) -> dict[str, Any]:
        """What evaluation.json says. The scores of the sets are left in output_dir."""
        return {
            "model": self.options.model,
            "reference": None if self.reference is None else str(self.reference.folder),
            "beta": self.beta,
            "sets": {name: self.analyse_set(name, scores) for name in self.sets},
            "benchmarks": {name: self.judge_benchmark(name, scores) for name in self.benchmarks},
            "data": {name: each.pairs.report.to_json() for name, each in self.sets.items()},
            "environment": environment(processes.world_size, processes.device),
            "job": self.identity(),
        }

    def analyse_set(self, name: str, scores: Scores) -> dict[str, Any]:
        pairs, index = self.sets[name].pairs, self.sets[name].index
        values, references = scores.of(f"set {name}")
        pair_scores = PairScores.of(
            name,
            pairs,
            index,
            dict(zip(self.saved.heads, np.moveaxis(np.stack(values), 2, 0))),
            None if references is None else np.stack(references)[:, :, 0],
            beta=self.beta,
            step=self.saved.metadata.get("training", {}).get("steps"),
        )
        analysis = analyse(pair_scores)
        pair_scores.keep_texts(pairs, index, self.formatter.tokenizer)
        pair_scores.save(self.options.output_dir / SCORES_FOLDER)
        return analysis

    def judge_benchmark(self, name: str, scores: Scores) -> dict[str, Any]:
        """{"cut": questions whose prompt was cut, "judges": judge -> result of the benchmark}."""
        evaluated = self.benchmarks[name]
        values, references = scores.of(f"benchmark {name}")
        judges = {head: [row[:, k] for row in values] for k, head in enumerate(self.saved.heads)}
        if references is not None:
            pairs = zip(judges["logprob"], references)
            judges["implicit"] = [self.beta * (logprob - reference[:, 0]) for logprob, reference in pairs]
        summarize = evaluated.benchmark.summarize
        results = {
            judge: summarize(evaluated.questions, [row.tolist() for row in rows]) for judge, rows in judges.items()
        }
        return {"cut": evaluated.num_cut, "judges": results}


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


def hash_of(content: Any) -> str:
    """Of what JSON can say."""
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
    options: EvaluationOptions, saved: Saved, formatter: ChatFormatter, processes: Processes, log: Console
) -> dict[str, EvaluatedSet]:
    """Read and tokenise the pairs of every set, as the model was trained unless the options say otherwise."""
    defaults = {"max_length": longest_conversation(options, saved), "truncation": DEFAULT_TRUNCATION}
    trained = trained_with(saved, "data")
    given = {name: trained.get(name, default) for name, default in defaults.items()}
    asked = {name: getattr(options, name) for name in (*defaults, "max_dropped_share")}
    given |= {name: value for name, value in asked.items() if value is not None}
    if given["max_length"] > options.max_tokens_per_micro_batch:
        raise DataError(
            f"conversations of up to {given['max_length']:,} tokens (--max_length) do not fit "
            f"--max_tokens_per_micro_batch {options.max_tokens_per_micro_batch:,}"
        )
    preparation = PreparationOptions(**given)
    sets = {}
    for name, sources in options.data.items():
        sets[name] = processes.in_turns(
            f"data {name}",
            partial(prepare_pairs, sources, formatter=formatter, options=preparation, role="eval", seed=0),
        )
        log.print(f"\n[bold]{name}[/bold]")
        log.print(sets[name].report.render(with_examples=False))
    return {name: EvaluatedSet(pairs, fixed_choice(len(pairs), options.max_pairs)) for name, pairs in sets.items()}


def longest_conversation(options: EvaluationOptions, saved: Saved) -> int:
    """Tokens that the model knows and a micro-batch holds."""
    return int(min(options.max_tokens_per_micro_batch, known_positions(load_model_config(saved.config))))


def read_benchmarks(
    options: EvaluationOptions, saved: Saved, formatter: ChatFormatter, processes: Processes
) -> dict[str, EvaluatedBenchmark]:
    """Read and tokenise the questions of every benchmark that was asked for."""
    max_length = options.max_length or longest_conversation(options, saved)
    found = {}
    for name, path in options.benchmarks.items():
        benchmark = BENCHMARKS[name]
        read = partial(benchmark.read, path or benchmark.default_path, None)
        questions = processes.in_turns(f"benchmark {name}", read)
        encoded = [encode_question(formatter, each.id, each.prompt, each.responses, max_length) for each in questions]
        num_cut = sum(was_cut for _, was_cut in encoded)
        found[name] = EvaluatedBenchmark(benchmark, questions, [ids for ids, _ in encoded], num_cut)
    return found


def encode_question(
    formatter: ChatFormatter, place: str, prompt: list[Message], responses: list[list[Message]], max_length: int
) -> tuple[list[ConversationIds], bool]:
    """-> (ids of each conversation, whether its prompt was cut).

    A conversation of more than `max_length` tokens loses the start of its prompt, as data.truncation keep_prompt_end
    does it: a leading BOS stays. All answers keep the same prompt, cut for the longest.

    Raises:
        DataError: naming `place`, for a conversation that cannot be rendered, or an answer that is too long by itself.
    """
    try:
        conversations = [tokenize_conversation(formatter, [*prompt, *response]) for response in responses]
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    excess = max(len(ids.prompt) + len(ids.response) for ids in conversations) - max_length
    if excess <= 0:
        return conversations, False
    has_bos = conversations[0].prompt[0] == formatter.tokenizer.bos_token_id
    kept = conversations[0].prompt[:1] if has_bos else []
    if excess > min(len(ids.prompt) for ids in conversations) - len(kept) - 1:
        raise DataError(
            f"{place}: an answer leaves no room for its prompt in {max_length:,} tokens, the least of --max_length, "
            "--max_tokens_per_micro_batch and the positions that the model knows"
        )
    return [ConversationIds([*kept, *ids.prompt[len(kept) + excess :]], ids.response) for ids in conversations], True
