"""An evaluation from model and data to evaluation.json, on any number of processes, killed and started again at will.

sources -> pairs -> scores of every pair (and of the reference) -> OUTPUT/evaluation/SET.parquet -> evaluation.json
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.config import DataConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.preparation import PreparedPairs, prepare_pairs
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tokenization import ConversationIds
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.benchmarks.benchmark import Benchmark, Question
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hafrm_ds.evaluation.pair_scores import EVALUATION_FILE, SCORES_FOLDER, PairScores, fixed_choice
from hafrm_ds.evaluation.questions import encode_question
from hafrm_ds.evaluation.scoring import Group, ModelForGroups, score_groups
from hafrm_ds.evaluation.tables import render_evaluation
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.opening import Saved, open_model
from hafrm_ds.model.policy import SavedPolicy
from hafrm_ds.model.saved import SavedModel
from hafrm_ds.model.scorer import DEFAULT_MAX_TOKENS
from hafrm_ds.scoring.parts import claim_folder, identity_of_model, leave_together, write_whole
from hafrm_ds.training.logging import RunLog, environment
from hafrm_ds.training.processes import Processes
from hafrm_ds.training.resume import fingerprint

PARTS_FOLDER = "parts"
BASE = "base"
"""As --reference: the weights that the training started from, as hafrm.json names them."""
DEFAULTS = {"max_length": 2048, "truncation": "keep_prompt_end"}
DEFAULT_BETA = 0.1
"""Where the model does not say what it was trained with."""


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

    @property
    def trust(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code, "trust_pickle": self.trust_pickle}


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


def evaluate(options: EvaluationOptions, processes: Processes) -> None:
    """Evaluate a model on sets of pairs and on benchmarks. All processes call this together.

    Leaves in output_dir: evaluation.json, evaluation/SET.parquet with the scores of every pair, report.html.

    Raises:
        DataError, ModelError: what was asked for cannot be evaluated.
    """
    log = RunLog(None, processes, files=False)
    saved = open_model(options.model, dtype=options.dtype, chat_template=options.chat_template, **options.trust)
    reference = open_reference(options, saved)
    formatter = saved.formatter()
    sets = prepare_sets(options, saved, formatter, processes, log)
    benchmarks = read_benchmarks(options, saved, formatter, processes)
    identity = identity_of(options, saved, reference, sets, benchmarks)
    folder = options.output_dir / PARTS_FOLDER
    if processes.from_first("state", lambda: claim_output(options.output_dir, folder, identity)) == "finished":
        log.print(f"{options.output_dir / EVALUATION_FILE} is there already, for this model and data")
        if processes.is_first:
            log.print(render_evaluation(json.loads((options.output_dir / EVALUATION_FILE).read_text())))
        leave_together(processes)
        return

    groups = [Group(f"set {name}", len(each.index), each.conversations) for name, each in sets.items()]
    groups += [Group(f"benchmark {name}", len(each.ids), each.ids.__getitem__) for name, each in benchmarks.items()]
    how = (options.deepspeed, options.max_tokens_per_micro_batch)
    scores = score_groups("scoring", ModelForGroups(saved, *how), saved.heads, groups, folder, processes, log)
    references = {}
    if reference is not None:
        model = ModelForGroups(reference, *how)
        references = score_groups("reference", model, ("logprob",), groups, folder, processes, log)
    if processes.is_first:
        beta = options.beta or trained_with(saved, "objective").get("beta", DEFAULT_BETA)
        found = {
            name: analyse_set(
                name,
                each,
                saved,
                scores[f"set {name}"],
                references.get(f"set {name}"),
                beta,
                options.output_dir,
                formatter,
            )
            for name, each in sets.items()
        }
        judged = {
            name: judge_benchmark(
                each, saved.heads, scores[f"benchmark {name}"], references.get(f"benchmark {name}"), beta
            )
            for name, each in benchmarks.items()
        }
        results = {
            "model": options.model,
            "reference": None if reference is None else str(reference.folder),
            "beta": beta,
            "sets": found,
            "benchmarks": judged,
            "data": {name: each.pairs.report.to_json() for name, each in sets.items()},
            "environment": environment(processes.world_size, processes.device),
            "job": identity,
        }
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(options.output_dir / EVALUATION_FILE, text.encode())
        shutil.rmtree(folder)
        log.print(render_evaluation(results))
        from hafrm_ds.evaluation.report.writing import write_evaluation_report  # matplotlib loads for long

        log.print(f"the results are in {options.output_dir}; report: {write_evaluation_report(options.output_dir)}")
    leave_together(processes)


def analyse_set(
    name: str,
    evaluated: EvaluatedSet,
    saved: Saved,
    scores: list[np.ndarray],
    references: list[np.ndarray] | None,
    beta: float,
    output_dir: Path,
    formatter: ChatFormatter,
) -> dict[str, Any]:
    """The analysis of a set, whose scores are left in output_dir.

    Args:
        scores: for each pair [2, heads]. references: for each [2, 1] log-probs, or None.
    """
    pair_scores = PairScores.of(
        name,
        evaluated.pairs,
        evaluated.index,
        dict(zip(saved.heads, np.moveaxis(np.stack(scores), 2, 0))),
        None if references is None else np.stack(references)[:, :, 0],
        beta=beta,
        step=saved.metadata.get("training", {}).get("steps"),
    )
    analysis = analyse(pair_scores)
    pair_scores.keep_texts(evaluated.pairs, evaluated.index, formatter.tokenizer)
    pair_scores.save(output_dir / SCORES_FOLDER)
    return analysis


def judge_benchmark(
    evaluated: EvaluatedBenchmark,
    heads: tuple[str, ...],
    scores: list[np.ndarray],
    references: list[np.ndarray] | None,
    beta: float,
) -> dict[str, Any]:
    """{"cut": questions whose prompt was cut, "judges": judge -> result of the benchmark}.

    Args:
        scores: for each question [responses, heads]. references: for each [responses, 1] log-probs, or None.
    """
    judges = {head: [values[:, k] for values in scores] for k, head in enumerate(heads)}
    if references is not None:
        pairs = zip(judges["logprob"], references)
        judges["implicit"] = [beta * (logprob - reference[:, 0]) for logprob, reference in pairs]
    summarize = evaluated.benchmark.summarize
    results = {judge: summarize(evaluated.questions, [row.tolist() for row in rows]) for judge, rows in judges.items()}
    return {"cut": evaluated.num_cut, "judges": results}


# ---- what is evaluated ---------------------------------------------------------------------------------------------


def open_reference(options: EvaluationOptions, saved: Saved) -> SavedPolicy | None:
    """The reference policy, under the formatter of the model and, as far as it is the same network, its layout.

    Raises:
        ModelError: it is no causal LM, or the model does not say what it started from.
    """
    if options.reference is None:
        return None
    if "logprob" not in saved.heads:
        raise ModelError(f"--reference is for the implicit reward of a policy; --model {options.model} has no LM head")
    name = options.reference
    if name == BASE:
        name = saved.metadata.get("base", {}).get("model")
        if name is None:
            raise ModelError(f"{saved.folder} does not say what it was trained from; give --reference a model")
    reference = open_model(name, dtype=saved.config.dtype, chat_template=options.chat_template, **options.trust)
    if isinstance(reference, SavedModel) or "logprob" not in reference.heads:
        raise ModelError(f"--reference {name} is no plain causal LM")
    known = {key: saved.metadata[key] for key in ("layout", "uses_stock_logits") if key in saved.metadata}
    return SavedPolicy(reference.folder, reference.config, known, reference.chat_template)


def prepare_sets(
    options: EvaluationOptions, saved: Saved, formatter: ChatFormatter, processes: Processes, log: RunLog
) -> dict[str, EvaluatedSet]:
    """Read and tokenise the pairs of every set, as the model was trained unless the options say otherwise."""
    trained = {"max_length": longest_conversation(options, saved)} | trained_with(saved, "data")
    given = {name: getattr(options, name) or trained.get(name, default) for name, default in DEFAULTS.items()}
    if options.max_dropped_share is not None:
        given["max_dropped_share"] = options.max_dropped_share
    if given["max_length"] > options.max_tokens_per_micro_batch:
        raise DataError(
            f"conversations of up to {given['max_length']:,} tokens (--max_length) do not fit "
            f"--max_tokens_per_micro_batch {options.max_tokens_per_micro_batch:,}"
        )
    sets = {}
    for name, sources in options.data.items():
        data = DataConfig(train=sources, **given)
        sets[name] = processes.in_turns(
            f"data {name}",
            lambda data=data: prepare_pairs(data.train, formatter=formatter, data=data, role="eval", seed=0),
        )
        log.print(f"\n[bold]{name}[/bold]")
        log.print(sets[name].report.render(with_examples=False))
    return {name: EvaluatedSet(pairs, fixed_choice(len(pairs), options.max_pairs)) for name, pairs in sets.items()}


def longest_conversation(options: EvaluationOptions, saved: Saved) -> int:
    """Tokens that the model knows and a micro-batch holds."""
    config = load_model_config(saved.config).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return min(options.max_tokens_per_micro_batch, positions or options.max_tokens_per_micro_batch)


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


def trained_with(saved: Saved, section: str) -> dict[str, Any]:
    """A section of the configuration that the model was trained with; {} where it does not say."""
    return saved.metadata.get("config", {}).get(section, {})


def identity_of(
    options: EvaluationOptions,
    saved: Saved,
    reference: SavedPolicy | None,
    sets: dict[str, EvaluatedSet],
    benchmarks: dict[str, EvaluatedBenchmark],
) -> dict[str, Any]:
    """What the results depend on: those of another job never mix with these."""
    return {
        "model": identity_of_model(saved),
        "reference": None if reference is None else identity_of_model(reference),
        "pairs": {name: [fingerprint(each.pairs), len(each.index)] for name, each in sets.items()},
        "questions": {
            name: hashlib.sha256(json.dumps(each.ids).encode()).hexdigest() for name, each in benchmarks.items()
        },
        "beta": options.beta,
        "max_tokens_per_micro_batch": options.max_tokens_per_micro_batch,
    }


def claim_output(output_dir: Path, folder: Path, identity: dict[str, Any]) -> str:
    """ "finished" or "open"; raises DataError if output_dir holds another evaluation."""
    file = output_dir / EVALUATION_FILE
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
