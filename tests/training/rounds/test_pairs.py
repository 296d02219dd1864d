"""Pairs of a round: which answers they are made of, how they are mixed, and prompts that are refused."""

import pytest

from hafrm_ds.config import DataConfig
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError
from hafrm_ds.training.rounds.options import RoundsSection
from hafrm_ds.training.rounds.pairs import ALIKE, CLOSE, TRUNCATED, mixed, pairs_of, refuse_held_out
from tests.data.row_files import write_lines


def section(**given) -> RoundsSection:
    return RoundsSection(**{"prompts": "prompts.jsonl", "evaluation_prompts": "held.jsonl"} | given)


def ranked(prompt: str, *scored: tuple[float, str]) -> dict:
    candidates = [{"response": text, "score": score, "ended": not text.endswith("...")} for score, text in scored]
    return {"prompt": prompt, "candidates": candidates}


RANKED = [
    ranked("a", (3.0, "one two three four"), (2.5, "one two"), (-1.0, "one")),
    ranked("b", (1.0, "x"), (1.0, "y")),
    ranked("c", (0.5, "x"), (0.4, "y")),
]


def test_the_best_answer_is_paired_with_the_worst():
    rows, left_out = pairs_of(RANKED, section())
    assert rows == [
        {"prompt": "a", "chosen": "one two three four", "rejected": "one", "margin": 4.0},
        {"prompt": "c", "chosen": "x", "rejected": "y", "margin": pytest.approx(0.1)},
    ]
    assert left_out == {ALIKE: 1}
    assert pairs_of(RANKED, section(min_gap=0.2))[1] == {ALIKE: 1, CLOSE: 1}


def test_answers_that_were_truncated_are_neither_chosen_nor_rejected():
    whole = ranked("a", (3.0, "one two..."), (2.5, "one two"), (0.0, "one"), (-1.0, "..."))
    lines = [whole, ranked("b", (3.0, "..."), (1.0, "x"))]
    rows, left_out = pairs_of(lines, section())
    assert rows == [{"prompt": "a", "chosen": "one two", "rejected": "one", "margin": 2.5}]
    assert left_out == {TRUNCATED: 1}
    assert pairs_of(lines, section(pairs="groups"))[0][0]["responses"] == ["one two", "one"]


def test_words_cost_where_that_is_asked_for():
    [row, _], _ = pairs_of(RANKED, section(length_penalty=0.5))
    assert (row["chosen"], row["rejected"], row["margin"]) == ("one two", "one", 3.0)
    [row, _], _ = pairs_of(RANKED, section(length_penalty=2.0))
    assert (row["chosen"], row["rejected"]) == ("one two", "one two three four")


def test_groups_have_all_answers_with_their_scores():
    rows, _ = pairs_of(RANKED[:1], section(pairs="groups", length_penalty=0.5))
    assert rows == [{"prompt": "a", "responses": ["one two", "one two three four", "one"], "scores": [1.5, 1.0, -1.5]}]


def test_a_share_of_human_pairs_is_replayed_beside_the_answers(tmp_path):
    human = [Source(path="a.jsonl"), Source(path="b.jsonl")]
    sources = mixed(tmp_path / "pairs.jsonl", human, section(replay=0.4))
    assert [(each.path, each.weight, each.reward_loss) for each in sources] == [
        (str(tmp_path / "pairs.jsonl"), 0.6, False),
        ("a.jsonl", pytest.approx(0.2), True),
        ("b.jsonl", pytest.approx(0.2), True),
    ]
    weighted = [each.model_copy(update={"weight": weight}) for each, weight in zip(human, (3, 1))]
    assert [each.weight for each in mixed(tmp_path, weighted, section(replay=0.4))] == pytest.approx([0.6, 0.3, 0.1])
    [alone] = mixed(tmp_path, human, section(replay=0, reward="helpful.yaml"))
    assert alone.weight is None and alone.reward_loss


def test_what_a_preset_trains_on_is_checked_and_not_what_it_tests_on(tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": "x", "rejected": "y"} for n in range(40)]  # the first two are for tests
    train = {"path": str(write_lines(tmp_path / "pairs.jsonl", rows)), "preset": "chatbot_arena", "max_pairs": 1}
    test = write_lines(tmp_path / "test.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}])
    data = DataConfig(train=train, eval={"human": str(test)}, cache_dir=tmp_path / "cache")
    own = section(
        prompts=write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}]),
        evaluation_prompts=write_lines(tmp_path / "held.jsonl", [{"prompt": [{"content": "p1", "role": "user"}]}]),
    )
    refuse_held_out(own, data)
    write_lines(tmp_path / "held.jsonl", [{"prompt": [{"content": "p39", "role": "user"}]}])
    with pytest.raises(DataError, match=r"held\.jsonl:1\) is also data\.train \(.*pairs\.jsonl:40\)"):
        refuse_held_out(own, data)


def test_prompts_that_are_trained_on_and_measured_are_refused(tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    held = write_lines(tmp_path / "held.jsonl", [{"prompt": "c"}])
    train, test = (
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": name, "chosen": "x", "rejected": "y"}])
        for name in ("train", "test")
    )
    data = DataConfig(train=str(train), eval={"human": str(test)}, cache_dir=tmp_path / "cache")
    own = section(prompts=prompts, evaluation_prompts=held)
    refuse_held_out(own, data)
    write_lines(train, [{"prompt": "c ", "chosen": "x", "rejected": "y"}])
    with pytest.raises(DataError, match=r"rounds\.evaluation_prompts \(.*held\.jsonl:1\) is also data\.train \(.*:1\)"):
        refuse_held_out(own, data)
    refuse_held_out(own.model_copy(update={"replay": 0.0}), data)
    write_lines(test, [{"prompt": "b", "chosen": "x", "rejected": "y"}])
    with pytest.raises(DataError, match=r"1 of 2 prompts .*:2\) is also data\.eval human \(.*test\.jsonl:1"):
        refuse_held_out(own, data)
    write_lines(held, [{"prompt": " a"}])
    with pytest.raises(DataError, match=r"prompts\.jsonl:1\) is also rounds\.evaluation_prompts \(.*held\.jsonl:1\)"):
        refuse_held_out(own, data)
    write_lines(prompts, [])
    with pytest.raises(DataError, match=r"rounds\.prompts .*prompts\.jsonl is empty"):
        refuse_held_out(own, data)
