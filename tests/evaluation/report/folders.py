"""Folders of runs and evaluations, written without a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hafrm_ds.config import ObjectiveConfig, TrainConfig
from hafrm_ds.data.report import Counts, DataReport, Example, TemplateFacts
from hafrm_ds.evaluation.accuracy import set_metrics
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.comparison import COMPARISON_FILE, Judged, Method, compare, run_folder
from hafrm_ds.evaluation.pair_scores import EVALUATION_FILE, SCORES_FOLDER, PairScores
from hafrm_ds.evaluation.refusal.measures import REFUSALS_FILE, Refusals, agreement, changes_from_first, describe
from hafrm_ds.evaluation.refusal.probes import OPENINGS, QUESTION, Openings, wording
from hafrm_ds.evaluation.refusal.subjects import Arm as DefendedArm
from hafrm_ds.evaluation.refusal.subjects import arms_of as refusal_arms
from hafrm_ds.evaluation.refusal.writing import REWRITE
from hafrm_ds.training.sweep import Arm, arms_of, axes_of
from tests.evaluation.benchmarks.rows import rm_bench_row, summary
from tests.evaluation.groups import rated_groups
from tests.test_objective import FIT

EVIL = "</pre></details><script>alert('&amp;')</script>\x00\x1b[31m\u202e"
EVIL_AS_SHOWN = (
    "&lt;/pre&gt;&lt;/details&gt;&lt;script&gt;alert(&#39;&amp;amp;&#39;)&lt;/script&gt;\\x00\\x1b[31m\\u202e"
)
NUM_PAIRS = 60
CHAT_REWARDS = [[4, 5, 6, 1, 2, 3], [1, 3, 5, 0, 2, 4]]
"""Of two questions of RM-Bench: all is won, and all but what is hard."""


def pair_scores(name: str = "held out", *, policy: bool = True, seed: int = 0) -> PairScores:
    """Scores of NUM_PAIRS pairs of two sources, with the texts of the worst."""
    generator = np.random.default_rng(seed)

    def drawn() -> np.ndarray:
        return generator.normal(size=(NUM_PAIRS, 2)).astype(np.float32) + np.float32([0.5, 0])

    scores = PairScores(
        set=name,
        step=40,
        beta=0.1,
        ids=[f"pairs.jsonl:{number}" for number in range(NUM_PAIRS)],
        sources=["forum", "chat & <b>"] * (NUM_PAIRS // 2),
        prompts=[f"{number // 2}" for number in range(NUM_PAIRS)],
        num_tokens=generator.integers(1, 200, size=(NUM_PAIRS, 2)),
        reward=drawn(),
        logprob=drawn() * 30 if policy else None,
        reference=drawn() * 30 if policy else None,
    )
    scores.texts = {
        place: Example(scores.ids[place], scores.sources[place], f"Why {rank}? {EVIL}", "Because.", "No.")
        for rank, place in enumerate(scores.mistakes())
    }
    return scores


def training_rows(steps: int, *, policy: bool = True) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "kind": "train", "loss/total": 1.2 - step / 100, "loss/reward": 0.7 - step / 200}
        row |= {"accuracy/reward": 0.5 + step / 200, "margin/reward": step / 50, "memory_gib": 3.25}
        row |= {"mfu": 0.4, "mfu_measured": 0.5}
        row |= {"grad_norm": 2.0, "learning_rate": 1e-5, "seconds": 0.5, "tokens_per_second": 4000.0}
        if policy:
            row |= {"loss/policy": 0.69, "accuracy/implicit": 0.5, "margin/implicit": 0.1}
        else:
            row["loss/total"] = row["loss/reward"]
        rows.append(row)
    return rows


def data_report() -> DataReport:
    counts = Counts(read=1234, formats={"transcripts": 1234}, dropped={"empty <i>": 34}, kept=1200, cut=7)
    return DataReport(
        role="train",
        max_length=512,
        truncation="drop",
        total=counts,
        by_source={"forum": counts},
        first_dropped={"empty <i>": "pairs.jsonl:77"},
        duplicates=3,
        both_orders=0,
        tokens={"prompt": {"p50": 11, "p90": 22, "p99": 33, "max": 44}},
        template=TemplateFacts("tokenizer", "{{ messages }}", "none", None, (), "0123456789abcdef"),
        examples=[Example("pairs.jsonl:5", "forum", "An example", EVIL, "No.")],
    )


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, *, steps: int = 40, policy: bool = True) -> Path:
    """A finished run with one evaluation set, evaluated at the start and at the end."""
    folder.mkdir(parents=True)
    config = {
        "output_dir": str(folder),
        "model": {"name_or_path": "some/model"},
        "data": {"train": "pairs.jsonl", "eval": {"held out": "held.jsonl"}},
        "objective": {"alpha": 0.2 if policy else 0.0},
    }
    (folder / "config.yaml").write_text(TrainConfig.model_validate(config).to_yaml())
    environment = {"started": "2026-02-03T04:05:06+00:00", "world_size": 2, "packages": {"torch": "9.9.9"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "data_report.json").write_text(json.dumps({"train": data_report().to_json()}))
    scores = pair_scores(policy=policy)
    scores.save(folder / SCORES_FOLDER)
    judges = {f"accuracy/{judge}": found["value"] for judge, found in analyse(scores)["accuracy"].items()}
    evaluations = [
        {"step": step, "kind": "eval", "set": "held out", "pairs": NUM_PAIRS, "loss/reward": 0.6, **judges}
        for step in (0, steps)
    ]
    write_rows(folder, [evaluations[0], *training_rows(steps, policy=policy), evaluations[1]])
    best = {"metric": "held out/accuracy/reward", "step": steps, "value": judges["accuracy/reward"]}
    (folder / "summary.json").write_text(json.dumps({"steps": steps, "best": best}))
    return folder


def graded_scores(name: str = "graded", size: int = 4) -> PairScores:
    """Scores of 40 groups of `size` answers, graded from 1 to 5, by both heads."""
    generator = np.random.default_rng(0)
    gold = generator.integers(1, 6, size=(40, size))
    gold[:, :2] = [1, 5]
    scores = rated_groups(gold, gold / 2 + generator.normal(size=gold.shape), name=name)
    places = scores.answers.place
    scores.logprob = generator.normal(scale=30, size=len(scores.answers.group)).astype(np.float32)[places]
    scores.reference = np.zeros_like(scores.logprob)
    return scores


def write_group_run(folder: Path) -> Path:
    """A finished run with one evaluation set, of groups of four answers."""
    write_run(folder)
    (folder / SCORES_FOLDER / "held%20out.parquet").unlink()
    scores = graded_scores()
    scores.save(folder / SCORES_FOLDER)
    metrics = set_metrics(scores, ObjectiveConfig())
    later = metrics | {"tau_b/reward": metrics["tau_b/reward"] + 0.1}
    evaluations = [
        {"step": step, "kind": "eval", "set": "graded", **each} for step, each in ((0, metrics), (40, later))
    ]
    write_rows(folder, [evaluations[0], *training_rows(40), evaluations[1]])
    return folder


def write_evaluation(folder: Path) -> Path:
    scores = pair_scores("arena")
    scores.combined, scores.fit = FIT.score(scores.reward, scores.logprob, scores.reference), FIT
    scores.save(folder / SCORES_FOLDER)
    chat = summary("rm-bench", folder, [rm_bench_row("chat")] * 2, CHAT_REWARDS)
    content = {
        "model": "org/scorer",
        "sets": {"arena": analyse(scores)},
        "benchmarks": {"rm-bench": {"cut": 1, "judges": {"reward": chat}}},
        "environment": {"python": "3.99"},
    }
    (folder / EVALUATION_FILE).write_text(json.dumps(content))
    return folder


def write_comparison(folder: Path, shares: dict[str, list[float]], planned_seeds: range) -> Path:
    """A comparison of methods. shares: method -> of each seed's training, the share of 100 pairs that it judges right,
    of both sets."""
    methods = []
    for name, of_seeds in shares.items():
        trainings = []
        for seed, share in enumerate(of_seeds):
            right = np.random.default_rng(seed).permutation(np.arange(100) < 100 * share)
            reward = np.stack([right, np.full(100, 0.5)], axis=1).astype(np.float32)
            names, lengths = [str(place) for place in range(100)], np.ones((100, 2), dtype=np.int64)
            trainings.append(
                {
                    each: PairScores(each, 5, 0.1, names, ["s"] * 100, names, lengths, reward=reward)
                    for each in ("near", "far <b>")
                }
            )
            run = run_folder(folder, name, seed)
            for scores in trainings[-1].values():
                scores.save(run / SCORES_FOLDER)
            write_rows(run, training_rows(5, policy=False))
        judged = [{each: Judged.of(scores) for each, scores in sets.items()} for sets in trainings]
        methods.append(Method(name, "reward", judged))
    seeds = range(len(next(iter(shares.values()))))
    results = compare(methods, ["near", "far <b>"], seeds, planned_seeds)
    (folder / COMPARISON_FILE).write_text(json.dumps(results))
    return folder


def write_sweep(
    folder: Path, sweep: dict[str, list], share_right: Callable[[Arm, str], float], num_seeds: int = 3
) -> dict[str, Any]:
    """The results of a sweep, which are returned too.

    Args:
        sweep: option -> its values.
        share_right: of 200 pairs of both sets, what a judge of an arm gets right: the same pairs first in all trainings
            of a seed.
    """
    folder.mkdir(exist_ok=True)
    config = TrainConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"name_or_path": "some/model"},
            "data": {"train": "pairs.jsonl", "eval": {"near": "near.jsonl", "far": "far.jsonl"}},
        }
    )
    axes = axes_of(config, [], [], sweep)
    judges = {"baseline": ["reward"], "dpo": ["implicit", "logprob"], "haf": ["reward", "implicit", "logprob"]}
    names, methods = [str(place) for place in range(200)], []
    for arm in arms_of(config, axes):
        trainings = []
        for seed in range(num_seeds):
            order = np.random.default_rng(seed).permutation(200)
            right = {
                judge: (order < round(200 * share_right(arm, judge))) * np.float32(1) for judge in judges[arm.kind]
            }
            trainings.append(dict.fromkeys(("near", "far"), Judged(names, names, right)))
        methods.append(Method(arm.name, arm.judge, trainings, arm.cells))
    seeds = range(num_seeds)
    results = compare(methods, ["near", "far"], seeds, seeds, {axis.name: axis.to_json() for axis in axes})
    (folder / COMPARISON_FILE).write_text(json.dumps(results))
    return results


def write_refusals(folder: Path) -> Path:
    """The results of launch/refusals.py: two models with a system message and rewriting, by both heads."""
    numbers = np.random.default_rng(0)
    models = ("start", "runs/mine/final")
    arms = {arm.name: arm for model in models for arm in refusal_arms(model, system=True, rewrite=True)}
    harmful = np.arange(120) % 2 == 0
    names, categories = [str(place) for place in range(120)], [f"category {place % 7}" for place in range(120)]

    def logits(arm: DefendedArm) -> np.ndarray:
        separated = (arm.model != "start") * np.where(harmful, 2.0, 0.5) + arm.system * 1.0
        return numbers.normal(size=120) - 1 + separated + arm.rewrite * np.where(harmful, 0.3, -0.2)

    probes = {}
    for probe in (OPENINGS, QUESTION):
        measured = {name: Refusals(names, harmful, categories, logits(arm)) for name, arm in arms.items()}
        probes[probe] = {
            "first": "start",
            "arms": {name: describe(each) for name, each in measured.items()},
            "changes": changes_from_first(measured, {name: arm.parts("start") for name, arm in arms.items()}),
        }
    verdicts = agreement(numbers.random(100) > 0.4, numbers.random(100) > 0.5, names[:100])
    results = {
        "prompts": {"harmful": 60, "benign": 60, "repeated": 0},
        "probes": probes,
        "generated": {name: {OPENINGS: verdicts} for name in arms},
        "wording": wording(Openings()) | {"system": "Be good.", "rewrite": REWRITE},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REFUSALS_FILE).write_text(json.dumps(results))
    return folder


def changed_config(folder: Path, section: str, **values) -> None:
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config[section] |= values
    file.write_text(yaml.safe_dump(config))
