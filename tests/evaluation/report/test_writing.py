"""Pages: their figures against the files they come from, and what they must not hold."""

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.order import GoldOrder
from hafrm_ds.evaluation.pair_scores import SCORES_FOLDER
from hafrm_ds.evaluation.report.charts import MAX_POINTS
from hafrm_ds.evaluation.report.curves import TRAINING_PANELS, curves_of
from hafrm_ds.evaluation.report.results_page import by_rank
from hafrm_ds.evaluation.report.writing import write_comparison_report, write_report
from tests.evaluation.groups import rated_groups
from tests.evaluation.report.folders import (
    EVIL,
    EVIL_AS_SHOWN,
    changed_config,
    graded_scores,
    pair_scores,
    training_rows,
    write_evaluation,
    write_group_run,
    write_rows,
    write_run,
)

VOID = {"meta", "link", "br", "path", "rect", "circle", "use"}


class Page(HTMLParser):
    """Tags, ids, and the texts of cells of a page; fails where tags do not close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open_tags, self.ids, self.references, self.cells, self.titles = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "h4":
            self.titles.append("")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open_tags):
            self.cells[-1] += data
        if self.open_tags[-1:] == ["h4"]:
            self.titles[-1] += data

    def row(self, name: str) -> list[str]:
        """The cells after the first one named so."""
        return self.cells[self.cells.index(name) + 1 :]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("reports") / "mine")


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_a_run_has_its_report_beside_it(run, html):
    assert (run / "report.html").read_text() == html
    assert "<h1>Run mine</h1>" in html and "finished after 40 steps" in html


def test_figures_are_those_of_the_files(run, html, page):
    found = analyse(pair_scores())
    reward = found["accuracy"]["reward"]
    pairs, shown = page.row("held out")[:2]
    assert pairs == "60" and shown == f"{reward['value']:.1%}{reward['low']:.1%} to {reward['high']:.1%}"
    ece = found["calibration"]["implicit"]["ece"]
    assert page.row("expected calibration error (ECE)")[1] == f"{ece:.1%}" and f"implicit, ECE {ece:.1%}" in html
    part = found["by_source"]["forum"]
    assert page.row("accuracy by source")[4:6] == ["forum", f"{part['pairs']}"]
    assert page.row("packages.torch")[0] == "9.9.9" and page.row("world_size")[0] == "2"
    assert "total from 1.19 at step 1 to 0.8 at step 40" in html
    assert "4000" in html and "3.25 GiB" in html and "alpha: 0.2" in html
    assert page.row("dropped: empty <i>")[:2] == ["34", "pairs.jsonl:77"]
    assert page.row("prompt")[:4] == ["11", "22", "33", "44"]


def test_all_charts_are_there(page):
    assert page.titles == [
        "Accuracy over the steps",
        "Loss over the steps",
        "Distribution of the reward head",
        "Distribution of the implicit reward",
        "Reliability",
        "Accuracy of the surest pairs",
        "Accuracy by length difference",
        "Accuracy by source",
        "Loss",
        "Accuracy on training pairs",
        "Margin of the rewards",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Peak memory",
        "Efficiency",
    ]


def test_both_peaks_that_a_step_is_measured_by_are_named(html):
    assert "MFU 40%, 50% of the measured peak" in html
    assert "of the peak FLOPs (MFU)" in html and "of the measured peak (mfu_measured)" in html


def test_two_peaks_that_are_one_are_drawn_once():
    rows = pd.DataFrame({"mfu": [0.4, 0.41], "mfu_measured": [0.4, 0.41], "padding_share": [0.1, 0.2]})
    efficiency = next(panel for panel in TRAINING_PANELS if panel.title == "Efficiency")
    assert [curve.label for curve in curves_of(efficiency, rows)] == ["of the peak FLOPs (MFU)", "padding"]


def test_texts_of_the_data_are_shown_and_never_run(html):
    assert html.count(EVIL_AS_SHOWN) == len(pair_scores().texts) + 1  # and the example of the data report
    assert "<script" not in html.lower() and EVIL not in html
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", html)
    assert html.count("Preference data often holds offensive") == 2


def test_mistakes_are_collapsed_the_worst_first(html):
    scores = pair_scores()
    worst = scores.mistakes()[0]
    assert f">1. margin \N{MINUS SIGN}{-scores.margins('reward')[worst]:.3g} of reward head" in html
    assert html.index("Why 0?") < html.index("Why 1?") < html.index("Why 9?")
    assert "<details open" not in html


def test_the_page_needs_nothing_from_elsewhere(html, page):
    assert not re.search(r"https?:|@import|<script|<iframe|<img", html)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert len(page.ids) == len(set(page.ids))


def test_a_baseline_shows_one_judge_and_one_loss(tmp_path):
    html = write_report(write_run(tmp_path / "baseline", policy=False)).read_text()
    page = Page(html)
    assert page.row("accuracy")[:3] == ["pairs", "reward head", "longer"]
    assert "Distribution of the implicit reward" not in page.titles
    assert re.search(r'aria-label="Loss: reward from [^;]*"', html)  # and no total of one part


def test_a_single_prompt_of_a_source_has_an_accuracy_without_an_interval(tmp_path):
    folder = write_run(tmp_path / "run")
    scores = pair_scores()
    scores.sources[:2] = ["alone"] * 2  # the two pairs of one prompt
    scores.reward[0], scores.reward[1] = [1, 0], [0, 1]
    scores.save(folder / SCORES_FOLDER)
    assert Page(write_report(folder).read_text()).row("alone")[:2] == ["2", "50.0%"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "config.yaml").touch()
    page = Page(write_report(tmp_path).read_text())
    assert page.titles == []


def test_a_long_run_stays_small_and_says_how(tmp_path):
    folder = write_run(tmp_path / "long")
    rows = training_rows(40)
    write_rows(folder, [rows[step % 40] | {"step": step + 1} for step in range(20_000)])
    html = write_report(folder).read_text()
    assert len(html) < 600_000
    points = [len(re.findall("[ML]", path)) for path in re.findall(r' d="([^"]*)"', html)]
    assert MAX_POINTS / 2 < max(points) <= 2 * MAX_POINTS + 2  # of the band: there and back
    assert "20,000 rows of metrics.jsonl; each point is the mean of 67 rows" in html


def test_groups_have_comparisons_an_order_and_distributions_by_rank(tmp_path):
    html = write_report(write_group_run(tmp_path / "groups")).read_text()
    page, scores = Page(html), graded_scores()
    found, order = analyse(scores), GoldOrder.of(scores)
    assert f"{len(scores)} comparisons of 40 prompts · 160 answers in 40 groups" in html
    assert page.row("accuracy")[0] == "comparisons" and page.row("graded")[0] == f"{len(scores)}"
    tau = found["ranking"]["reward"]["tau_b"]
    assert page.row("Kendall's tau-b")[0].startswith(f"{tau['value']:.4g}") and tau["low"] > 0.5
    assert page.row("top-1")[1].startswith(f"{found['ranking']['implicit']['top_1']['value']:.1%}")
    assert "Order within groups over the steps" in page.titles
    assert "Reward head by gold rank" in page.titles
    best = scores.answers.values(scores.reward)[order.rank == 0]
    assert f"1st: mean {best.mean():.3g}, deviation {best.std():.3g}; 2nd: mean" in html and "chosen: mean" not in html
    words = html[html.index("<h2>Evaluation") : html.index("<h2>Training")]
    assert "pairs" not in re.sub(r"<style.*?</style>", "", words)


def test_ranks_beyond_the_eighth_are_drawn_together():
    scores = rated_groups([range(11), [0, 1]], [range(11), [0, 1]])
    found = by_rank(GoldOrder.of(scores), scores.answers.values(scores.reward))
    assert list(found)[-2:] == ["7th", "8th and below"] and found["8th and below"].tolist() == [0, 1, 2, 3]
    assert found["1st"].tolist() == [1, 10] and found["2nd"].tolist() == [0, 9]


def test_an_evaluation_has_its_accuracies_and_benchmarks(tmp_path):
    html = write_report(write_evaluation(tmp_path)).read_text()
    page = Page(html)
    assert f"<h1>Evaluation {tmp_path.name}</h1>" in html and "org/scorer" in html
    assert page.row("Chat")[:3] == ["2", "83.3%", "Chat, hard"] and page.row("Chat, hard")[1] == "50.0%"
    assert page.row("overall")[:2] == ["2", "-"]  # three of the four domains have no questions
    assert "RM-Bench (1 questions with a cut prompt)" in html
    assert "Reliability" in page.titles and "Why 0?" in html and page.row("python")[0] == "3.99"


def test_both_heads_as_one_judge_have_their_column_weights_and_curve(tmp_path):
    folder = write_evaluation(tmp_path)
    html = write_report(folder).read_text()
    page = Page(html)
    assert page.row("accuracy")[:6] == ["pairs", "reward head", "implicit reward", "log-prob", "both heads", "longer"]
    found = json.loads((folder / "evaluation.json").read_text())["sets"]["arena"]
    assert f"{found['accuracy']['combined']['value']:.1%}" in page.row("arena")[4]
    assert "weight 1.00 [0.50, 1.50] of the reward head, 0.75 [0.62, 0.88] of the implicit reward, fitted on 80" in html
    half, everything = (each for each in found["coverage"] if each["share"] in (0.5, 1.0))
    assert f"50% of the pairs: reward {half['accuracy']['reward']:.1%}" in html and half["pairs"] == 30
    for judge, value in everything["accuracy"].items():
        assert value == pytest.approx(found["accuracy"][judge]["value"])
    heads = found["heads"]
    assert heads["agree"]["pairs"] + heads["disagree"]["pairs"] == 60
    assert page.row("accuracy where reward head and implicit reward")[6] == f"{heads['agree']['pairs']}"


def test_several_runs_stand_side_by_side(tmp_path):
    hybrid, baseline = (write_run(tmp_path / name, policy=name == "hybrid") for name in ("hybrid", "baseline"))
    changed_config(baseline, "optimizer", learning_rate=3e-4)
    file = write_comparison_report([hybrid, baseline, write_evaluation(tmp_path)], tmp_path / "all.html")
    html = file.read_text()
    page = Page(html)
    names = ["hybrid", "baseline", tmp_path.name]
    for name in names:
        assert f"<span>{name}</span>" in html
    reward = pair_scores(policy=False)
    value = analyse(reward)["accuracy"]["reward"]
    assert f"{value['value']:.1%}{value['low']:.1%} to {value['high']:.1%}" in page.cells
    assert page.row("optimizer.learning_rate")[:2] == ["1e-05", "0.0003"]
    assert page.row("objective.alpha")[:2] == ["0.2", "0.0"]
    assert "output_dir" not in page.cells and "objective.beta" not in page.cells
    assert "Loss: reward" in page.titles and "Loss: policy" in page.titles
    assert re.search(r'aria-label="Loss: reward: hybrid from [^"]*; baseline from', html)
    assert "<script" not in html and len(page.ids) == len(set(page.ids))


def test_a_broken_file_leaves_no_page(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "environment.json").write_text("{")
    with pytest.raises(DataError, match=r"environment\.json"):
        write_report(folder)
    assert not list(folder.glob("*.html")) and not list(folder.glob(".*.html"))


def test_the_model_of_an_evaluation_is_escaped(tmp_path):
    folder = write_evaluation(tmp_path)
    content = json.loads((folder / "evaluation.json").read_text()) | {"model": EVIL}
    (folder / "evaluation.json").write_text(json.dumps(content))
    html = write_report(folder, tmp_path / "elsewhere.html").read_text()
    assert EVIL_AS_SHOWN in html and "<script" not in html
