"""The results of an evaluation as tables for the terminal."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from hafrm_ds.data.tables import Cell, EstimateJson, Table, as_text, count, number_estimate, share, share_estimate
from hafrm_ds.evaluation.benchmarks.catalogue import render

JUDGES = {"reward": "reward head", "implicit": "implicit reward", "logprob": "log-prob"}
"""Judge -> what people call it."""


def render_evaluation(results: dict[str, Any]) -> RenderableType:
    """Tables of what evaluation.json holds."""
    sets = results["sets"]
    tables = [sets_table(sets), yardstick_table(sets), calibration_table(sets)] if sets else []
    for name, found in sets.items():
        judges = {judge: JUDGES[judge] for judge in found["accuracy"]}
        tables.append(length_table(f"{name}: chosen longer by", found, judges))
    parts: list[RenderableType] = [table.to_rich() for table in tables]
    for found in results["benchmarks"].values():
        for judge, result in found["judges"].items():
            parts += [Text(f"\n{result['title']}, judged by the {JUDGES[judge]}"), render(result)]
        if found["cut"]:
            parts.append(Text(f"{found['cut']:,} questions lost the start of their prompt"))
        if found.get("left_out"):  # older results do not say
            parts.append(
                as_text(f"{found['left_out']:,} questions were left out, the first: {found['why_left_out'][0]}")
            )
    return Group(*parts)


def accuracy_table(
    title: str,
    parts: Iterable[tuple[str, Mapping[str, Any]]],
    judges: Mapping[str, str],
    further: Mapping[str, Callable[[Any], Cell]] | None = None,
) -> Table:
    """Pairs and the accuracy of every judge on parts of the data, for the terminal and the pages alike.

    Args:
        parts: of each part its name, and a mapping with `pairs` and `accuracy`.
        judges: judge -> header of its column.
        further: header of a further column -> its cell of a part.
    """
    further = further or {}
    rows = []
    for name, part in parts:
        cells = [share_estimate(part["accuracy"].get(judge)) for judge in judges]
        rows.append((name, [count(part["pairs"]), *cells, *(cell(part) for cell in further.values())]))
    return Table(rows, (title, "pairs", *judges.values(), *further))


def sets_table(sets: dict[str, Any]) -> Table:
    """Accuracy of every judge on every set, and on its sources where there are several."""
    judges = {judge: JUDGES[judge] for judge in judges_of(sets)}
    parts = []
    for name, found in sets.items():
        parts.append((name, found))
        parts += [(f"  {source}", part) for source, part in found["by_source"].items() if len(found["by_source"]) > 1]

    def ties(part: dict[str, Any]) -> Cell:
        return Cell(", ".join(f"{part['ties'][judge]:,}" for judge in judges if judge in part.get("ties", ())))

    return accuracy_table("Accuracy [95%]", parts, judges, {"ties": ties})


def yardstick_table(sets: dict[str, Any]) -> Table:
    """What an accuracy is worth: that of always taking the longer or the shorter answer, and how often two judges
    prefer the same one."""
    both = list(itertools.combinations(judges_of(sets), 2))
    headers = [f"{one} &\n{other}\nagree" for one, other in both]
    rows = []
    for name, found in sets.items():
        wins = [share_estimate(found["yardsticks"][kind]) for kind in ("longer", "shorter")]
        rows.append((name, [*wins, *(share(agreement_of(found["agreement"], *pair)) for pair in both)]))
    return Table(rows, ("Yardsticks [95%]", "longer wins", "shorter wins", *headers))


def judges_of(sets: dict[str, Any]) -> list[str]:
    """The judges that any of the sets knows."""
    return [judge for judge in JUDGES if any(judge in found["accuracy"] for found in sets.values())]


def agreement_of(agreement: dict[str, float], one: str, other: str) -> float | None:
    """Of two judges in any order, from what `analyse` says of all."""
    return agreement.get(f"{one}/{other}", agreement.get(f"{other}/{one}"))


def calibration_table(sets: dict[str, Any]) -> Table:
    """How well the confidence of a judge agrees with its accuracy."""
    names = ("judge", "margin", "ECE", "Brier", "log\nloss", "fitted\nT", "ECE\nat T", "Brier\nat T")
    rows = []
    for name, found in sets.items():
        for judge, values in found["calibration"].items():
            temperature = values["temperature"]
            texts = [JUDGES[judge], f"{found['margin'][judge]['value']:.3g}"]
            texts += [f"{values[key]:.3f}" for key in ("ece", "brier", "log_loss")]
            texts.append("none" if temperature is None else f"{temperature:.2f}")
            at_temperature = (values["ece_at_temperature"], values["brier_at_temperature"])
            texts += ["" if value is None else f"{value:.3f}" for value in at_temperature]
            rows.append((name, [*map(Cell, texts)]))
    return Table(rows, ("Calibration", *names))


def length_table(title: str, found: dict[str, Any], judges: Mapping[str, str]) -> Table:
    """Accuracy by how much longer the chosen answer is."""
    parts = [(length_range(part["low"], part["high"]), part) for part in found["by_length_difference"]]
    return accuracy_table(title, parts, judges)


def length_range(low: int | None, high: int | None) -> str:
    """Bounds of a bin, in tokens, in words."""
    if low is None:
        return f"up to {high:,} tokens"
    if high is None:
        return f"from {low:,} tokens"
    return f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"


def render_best_of_n(results: dict[str, Any]) -> RenderableType:
    """Tables of what best_of_n.json holds."""
    sizes = results["candidates"]
    most = f" to {sizes['most']:,}" if sizes["most"] > sizes["fewest"] else ""
    title = f"{results['prompts']:,} prompts, best of {sizes['fewest']:,}{most}"
    if results["gold"] is None:
        return as_text(f"{title}; without gold scores there is nothing to compare the rankings with")
    found = results["results"]
    tables = [pick_table(found), ranking_table(found), curve_table(found)]
    if found["pairs"]:
        tables.append(pair_table(found["pairs"]))
    return Group(as_text(f"{title}, by the gold scores of {results['gold']}"), *(table.to_rich() for table in tables))


def pick_table(found: dict[str, Any]) -> Table:
    """What each model's picks are worth, beside the random choice and the ends."""
    rows = [
        (name, [gold_score(model["pick"]), gold_score(model["gain"]), share_estimate(model.get("win_rate"))])
        for name, model in found["models"].items()
    ]
    for name, key in (("random choice", "mean"), ("best candidate", "best"), ("worst candidate", "worst")):
        rows.append((f"({name})", [gold_score(found["gold"][key])]))
    return Table(rows, ("Pick [95%]", "gold score", "over random", "win rate"))


def ranking_table(found: dict[str, Any]) -> Table:
    """How well each model ranks."""
    ks = list(found["random"]["top_k_recall"])
    rows = []
    for name, model in found["models"].items():
        recalls = [share_estimate(model["top_k_recall"][k]) for k in ks]
        rows.append((name, [*recalls, gold_score(model["spearman"]), gold_score(model["kendall"])]))
    rows.append(("(random choice)", [share(found["random"]["top_k_recall"][k]["value"]) for k in ks]))
    return Table(rows, ("Ranking [95%]", *(f"top-{k} recall" for k in ks), "Spearman", "Kendall"))


def curve_table(found: dict[str, Any]) -> Table:
    """Expected gold score of the pick among n random candidates, for n = 1, 2, 4, ... and all."""
    most = len(found["best_curve"])
    ns = [n for n in (2**power for power in range(most.bit_length())) if n < most] + [most]
    curves = {name: model["curve"] for name, model in found["models"].items()} | {"(gold scorer)": found["best_curve"]}
    rows = [(name, [Cell(f"{curve[n - 1]['value']:.3g}") for n in ns]) for name, curve in curves.items()]
    return Table(rows, ("Gold score of the best of", *map(str, ns)))


def pair_table(pairs: list[dict[str, Any]]) -> Table:
    """Whose pick has the higher gold score."""
    keys = ("wins", "ties", "losses")
    rows = [(" against ".join(pair["models"]), [share_estimate(pair[key]) for key in keys]) for pair in pairs]
    return Table(rows, ("Pick against pick", *keys))


def gold_score(estimate: EstimateJson | None) -> Cell:
    return number_estimate(estimate, "{:.3g}".format)
