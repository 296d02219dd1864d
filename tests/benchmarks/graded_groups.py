"""Groups of graded answers in the quickstart's world, whose true order is known, and what trainings on them reach.

    python -m tests.benchmarks.graded_groups write FOLDER
    python -m tests.benchmarks.graded_groups table NAME=FOLDER [NAME=FOLDER ...]

write: FOLDER/data/groups.jsonl, GROUPS prompts with ANSWERS answers each, scored by the rubric plus normal noise
of NOISE points, and pairs.jsonl, every comparison of these scores as a pair. Tests with the true scores:
same_answers.jsonl (the same topics) and other_answers.jsonl (topics never trained on).
table: mean and 95% interval over seeds of what the last evaluation of each run of compare.py says, for each method of
each comparison, and the paired differences from the same method with the pairwise loss on groups.
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from hafrm_ds.quickstart import SEED, TRAINED_TOPICS, WORLD, write_answer

GROUPS, TEST_GROUPS, ANSWERS = 320, 300, 4
NOISE = 2.0
MEASURES = ("accuracy/reward", "tau_b/reward", "top_1/reward", "loss/reward", "accuracy/implicit", "tau_b/implicit")
NUM_RESAMPLES = 10_000


def groups(count: int, seed: int, noise: float, topics: slice) -> list[dict]:
    """Rows `prompt, responses, scores`; answers of a group differ."""
    rng, of_noise = random.Random(f"groups {seed}"), random.Random(f"noise {seed}")
    rows: list[dict] = []
    while len(rows) < count:
        topic = rng.choice(WORLD["topics"][topics])
        thing = rng.choice(topic["things"])
        prompt = rng.choice(topic["questions"]).format(thing=thing)
        answers = [write_answer(thing, topic, rng) for _ in range(ANSWERS)]
        if len({answer.text for answer in answers}) == ANSWERS and len({answer.score for answer in answers}) > 1:
            scores = [answer.score + of_noise.gauss(0, noise) if noise else answer.score for answer in answers]
            rows.append({"prompt": prompt, "responses": [answer.text for answer in answers], "scores": scores})
    return rows


def as_pairs(row: dict) -> list[dict]:
    ranked = sorted(zip(row["scores"], row["responses"]), reverse=True)
    return [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse}
        for place, (score, better) in enumerate(ranked)
        for other, worse in ranked[place + 1 :]
        if other < score
    ]


def write(folder: Path) -> None:
    data, trained, others = folder / "data", slice(0, TRAINED_TOPICS), slice(TRAINED_TOPICS, None)
    data.mkdir(parents=True, exist_ok=True)
    train = groups(GROUPS, SEED, NOISE, trained)
    sets = {
        "groups": train,
        "pairs": [pair for row in train for pair in as_pairs(row)],
        "same_answers": groups(TEST_GROUPS, SEED + 1, 0.0, trained),
        "other_answers": groups(TEST_GROUPS, SEED + 2, 0.0, others),
    }
    for name, rows in sets.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{data / name}.jsonl: {len(rows)} rows")


def last_evaluations(run: Path) -> dict[str, dict[str, float]]:
    """Name of a set -> its last evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["set"]: row for row in rows if row["kind"] == "eval"}


def table(comparisons: dict[str, Path]) -> None:
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = defaultdict(dict)  # method -> seed -> set -> measures
    for name, folder in comparisons.items():
        for run in sorted((folder / "runs").glob("*-seed*")):
            if (run / "metrics.jsonl").exists() and (run / "summary.json").exists():
                method, seed = run.name.rsplit("-seed", 1)
                found[f"{name} {method}"][seed] = last_evaluations(run)
    generator = np.random.default_rng(0)
    for set_name in next(iter(next(iter(found.values())).values())):
        print(f"\n{set_name}\n\n| method | seeds | {' | '.join(MEASURES)} |\n{'|---' * (2 + len(MEASURES))}|")
        for method, by_seed in found.items():
            kind = method.split(" ")[1].split("-ranking")[0]
            yardstick = next((name for name in found if f" {kind}-ranking-losspairwise" in name), method)
            cells = []
            for measure in MEASURES:
                values = {seed: each[set_name][measure] for seed, each in by_seed.items() if measure in each[set_name]}
                cells.append(f"{np.mean(list(values.values())):.3f}" if values else "")
                others = found[yardstick].items()
                base = {seed: each[set_name][measure] for seed, each in others if measure in each[set_name]}
                both = [seed for seed in values if seed in base]
                if method != yardstick and len(both) > 1:
                    gains = np.array([values[seed] - base[seed] for seed in both])
                    means = gains[generator.integers(len(gains), size=(NUM_RESAMPLES, len(gains)))].mean(axis=1)
                    low, high = np.quantile(means, [0.025, 0.975])
                    cells[-1] += f" ({gains.mean():+.3f} [{low:+.3f}, {high:+.3f}])"
            print(f"| {method} | {len(by_seed)} | {' | '.join(cells)} |")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["write"] and len(arguments) == 2:
        write(Path(arguments[1]))
    elif arguments[:1] == ["table"] and len(arguments) > 1:
        table({name: Path(folder) for name, _, folder in (each.partition("=") for each in arguments[1:])})
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
