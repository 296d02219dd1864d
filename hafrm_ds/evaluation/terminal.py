"""The results of an evaluation as tables for the terminal."""

import itertools
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hafrm_ds.data.report import as_text, number_table, printable
from hafrm_ds.evaluation.benchmarks.catalogue import render
from hafrm_ds.evaluation.bootstrap import EstimateJson

JUDGES = {"reward": "reward head", "implicit": "implicit reward", "logprob": "log-prob"}
"""Judge -> what people call it."""


def render_evaluation(results: dict[str, Any]) -> RenderableType:
    """Tables of what evaluation.json holds."""
    sets = results["sets"]
    tables = (accuracy_table, yardstick_table, calibration_table) if sets else ()
    parts: list[RenderableType] = [table(sets) for table in tables]
    parts += [length_table(name, found) for name, found in sets.items()]
    for found in results["benchmarks"].values():
        for judge, result in found["judges"].items():
            parts += [Text(f"\n{result['title']}, judged by the {JUDGES[judge]}"), render(result)]
        if found["cut"]:
            parts.append(Text(f"{found['cut']:,} questions lost the start of their prompt"))
    return Group(*parts)


def accuracy_table(sets: dict[str, Any]) -> Table:
    """Accuracy of every judge on every set, and on its sources where there are several."""
    judges = judges_of(sets)
    table = number_table("Accuracy [95%]", "pairs", *(JUDGES[judge] for judge in judges), "ties")
    for name, found in sets.items():
        ties = ", ".join(f"{found['ties'][judge]:,}" for judge in judges)
        cells = [interval(found["accuracy"].get(judge)) for judge in judges]
        table.add_row(as_text(name), f"{found['pairs']:,}", *cells, ties)
        for source, part in found["by_source"].items() if len(found["by_source"]) > 1 else ():
            cells = [interval(part["accuracy"].get(judge)) for judge in judges]
            table.add_row(as_text(f"  {source}"), f"{part['pairs']:,}", *cells, "")
    return table


def yardstick_table(sets: dict[str, Any]) -> Table:
    """What an accuracy is worth: that of always taking the longer or the shorter answer, and how often two judges
    prefer the same one."""
    both = list(itertools.combinations(judges_of(sets), 2))
    headers = [f"{one} &\n{other}\nagree" for one, other in both]
    table = number_table("Yardsticks [95%]", "longer wins", "shorter wins", *headers)
    for name, found in sets.items():
        shares = [agreement_of(found["agreement"], one, other) for one, other in both]
        wins = [interval(found["yardsticks"][kind]) for kind in ("longer", "shorter")]
        table.add_row(as_text(name), *wins, *("" if share is None else f"{share:.1%}" for share in shares))
    return table


def judges_of(sets: dict[str, Any]) -> list[str]:
    """The judges that any of the sets knows."""
    return [judge for judge in JUDGES if any(judge in found["accuracy"] for found in sets.values())]


def agreement_of(agreement: dict[str, float], one: str, other: str) -> float | None:
    """Of two judges in any order, from what `analyse` says of all."""
    return agreement.get(f"{one}/{other}", agreement.get(f"{other}/{one}"))


def calibration_table(sets: dict[str, Any]) -> Table:
    """How well the confidence of a judge agrees with its accuracy."""
    names = ("judge", "margin", "ECE", "Brier", "log\nloss", "fitted\nT", "ECE\nat T", "Brier\nat T")
    table = number_table("Calibration", *names)
    for name, found in sets.items():
        for judge, values in found["calibration"].items():
            temperature = values["temperature"]
            at_temperature = (values["ece_at_temperature"], values["brier_at_temperature"])
            table.add_row(
                as_text(name),
                JUDGES[judge],
                f"{found['margin'][judge]['value']:.3g}",
                f"{values['ece']:.3f}",
                f"{values['brier']:.3f}",
                f"{values['log_loss']:.3f}",
                "none" if temperature is None else f"{temperature:.2f}",
                *("" if value is None else f"{value:.3f}" for value in at_temperature),
            )
    return table


def length_table(name: str, found: dict[str, Any]) -> Table:
    """Accuracy by how much longer the chosen answer is."""
    judges = list(found["accuracy"])
    table = number_table(f"{escape(printable(name))}: chosen longer by", "pairs", *(JUDGES[judge] for judge in judges))
    for part in found["by_length_difference"]:
        cells = [interval(part["accuracy"][judge]) for judge in judges]
        table.add_row(length_range(part["low"], part["high"]), f"{part['pairs']:,}", *cells)
    return table


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
    parts: list[RenderableType] = [as_text(f"{title}, by the gold scores of {results['gold']}")]
    parts += [pick_table(found), ranking_table(found), curve_table(found)]
    return Group(*parts, *([pair_table(found["pairs"])] if found["pairs"] else []))


def pick_table(found: dict[str, Any]) -> Table:
    """What each model's picks are worth, beside the random choice and the ends."""
    table = number_table("Pick [95%]", "gold score", "over random", "win rate")
    for name, model in found["models"].items():
        values = [number_interval(model[key]) for key in ("pick", "gain")]
        table.add_row(as_text(name), *values, interval(model.get("win_rate")))
    for name, key in (("random choice", "mean"), ("best candidate", "best"), ("worst candidate", "worst")):
        table.add_row(f"({name})", number_interval(found["gold"][key]), "", "")
    return table


def ranking_table(found: dict[str, Any]) -> Table:
    """How well each model ranks."""
    ks = list(found["random"]["top_k_recall"])
    table = number_table("Ranking [95%]", *(f"top-{k} recall" for k in ks), "Spearman", "Kendall")
    for name, model in found["models"].items():
        recalls = [interval(model["top_k_recall"][k]) for k in ks]
        table.add_row(as_text(name), *recalls, *(number_interval(model[key]) for key in ("spearman", "kendall")))
    table.add_row("(random choice)", *(f"{found['random']['top_k_recall'][k]['value']:.1%}" for k in ks), "", "")
    return table


def curve_table(found: dict[str, Any]) -> Table:
    """Expected gold score of the pick among n random candidates, for n = 1, 2, 4, ... and all."""
    most = len(found["best_curve"])
    ns = [n for n in (2**power for power in range(most.bit_length())) if n < most] + [most]
    table = number_table("Gold score of the best of", *map(str, ns))
    curves = {name: model["curve"] for name, model in found["models"].items()}
    for name, curve in (curves | {"(gold scorer)": found["best_curve"]}).items():
        table.add_row(as_text(name), *(f"{curve[n - 1]['value']:.3g}" for n in ns))
    return table


def pair_table(pairs: list[dict[str, Any]]) -> Table:
    """Whose pick has the higher gold score."""
    table = number_table("Pick against pick", "wins", "ties", "losses")
    for pair in pairs:
        first, second = pair["models"]
        table.add_row(
            as_text(f"{first} against {second}"), *(interval(pair[key]) for key in ("wins", "ties", "losses"))
        )
    return table


def number_interval(value: EstimateJson | None) -> str:
    if value is None:
        return ""
    ends = "" if value["low"] is None else f" [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value['value']:.3g}{ends}"


def interval(value: EstimateJson | None) -> str:
    """A share in percent."""
    if value is None:
        return ""
    low, high = value["low"], value["high"]
    ends = "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{value['value']:.1%}{ends}"
