"""The figures of a best-of-N as tables for the terminal."""

from typing import Any

from rich.console import Group, RenderableType

from hafrm_ds.data.tables import Cell, Estimate, Table, as_text, number_estimate, share, share_estimate


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
    return Group(as_text(f"{title}, by the gold scores of {results['gold']}"), *tables)


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


def gold_score(estimate: Estimate | None) -> Cell:
    return number_estimate(estimate, "{:.3g}".format)
