"""The page of a comparison of methods: its own figures above the runs side by side."""

import json
import re

import numpy as np

from hafrm_ds.evaluation.comparison import Method, compare
from hafrm_ds.evaluation.pair_scores import PairScores
from hafrm_ds.evaluation.report.writing import write_methods_report


def method(name: str, shares: list[float], folder) -> Method:
    """Trainings that judge these shares of 100 pairs of two sets right, with what a run folder has of them."""
    trainings = []
    for seed, share in enumerate(shares):
        scores = {}
        for set_name in ("near", "far <b>"):
            right = np.random.default_rng(seed).permutation(np.arange(100) < 100 * share)
            reward = np.stack([right, np.full(100, 0.5)], axis=1).astype(np.float32)
            names = [str(place) for place in range(100)]
            lengths = np.ones((100, 2), dtype=np.int64)
            scores[set_name] = PairScores(set_name, 5, 0.1, names, ["s"] * 100, names, lengths, reward=reward)
        run = folder / f"{name}-seed{seed}"
        for each in scores.values():
            each.save(run / "evaluation")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "kind": "train", "loss/total": 0.7}) + "\n")
        trainings.append(scores)
    return Method(name, "reward", trainings)


def test_accuracies_and_paired_differences_stand_above_the_runs(tmp_path):
    methods = [method("baseline", [0.6, 0.7], tmp_path), method("haf", [0.8, 0.7], tmp_path)]
    results = compare(methods, ["near", "far <b>"], seeds=[0, 1])
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    page = write_methods_report(results, folders, tmp_path / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "2 methods, 2 seeds" in text and "In distribution: near. Out of distribution: far &lt;b&gt;" in text
    assert "haf - baseline" in text and "+10.0 [" in text and "+20.0 · +0.0" in text
    assert "haf, reward head 75.0%" in text and "baseline-seed1" in text
    assert page.index("Paired differences") < page.index("Overview")
    assert "<b>" not in page.replace("far &lt;b&gt;", "")
