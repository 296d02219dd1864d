"""Portions, caps and mixing weights."""

from collections import Counter

import pytest

from hafrm_ds.data.selection import mixed_counts
from tests.data.row_files import error_of, outcomes, prompts, rows_of, write_lines

# ---- portion and max_pairs -----------------------------------------------------------------------------------------


def test_a_portion_counts_only_pairs_left_by_the_filters(read):
    write_lines("x.jsonl", [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "odd": n % 2} for n in range(40)])
    pairs = read({"path": "x.jsonl", "where": {"odd": 1}, "portion": ":10%"})
    assert prompts(pairs) == ["p1", "p3"]
    assert outcomes(pairs) == {"": 2, "row filter odd=1": 20, "outside portion": 18}
    message = error_of(read, {"path": "x.jsonl", "portion": ":2%"})
    assert message == "x: no pair is left of 40 rows (outside portion: 40)"


def test_max_pairs_is_a_seeded_choice_in_reading_order(read):
    write_lines("x.jsonl", rows_of(40))
    source = {"path": "x.jsonl", "max_pairs": 10}
    first = read(source)
    assert outcomes(first) == {"": 10, "over max_pairs": 30}
    assert prompts(first) == sorted(prompts(first), key=lambda prompt: int(prompt[1:]))
    assert prompts(read(source)) == prompts(first)
    assert prompts(read(source, seed=1)) != prompts(first)
    assert outcomes(read({"path": "x.jsonl", "max_pairs": 100})) == {"": 40}


def test_unusable_rows_take_part_in_the_selection(read):
    """So the dropped share is that of the rows that were asked for, not of the file."""
    conversations = [[{"role": "user", "content": f"p{n}"}] for n in range(40)]
    answered = [[*start, {"role": "assistant", "content": "a"}] for start in conversations]
    # Every odd row has no common prompt.
    write_lines("x.jsonl", [{"chosen": answered[n], "rejected": answered[n - n % 2]} for n in range(40)])
    pairs = read({"path": "x.jsonl", "portion": ":25%"})
    assert outcomes(pairs) == {"": 5, "no common prompt": 5, "outside portion": 30}
    pairs = read({"path": "x.jsonl", "portion": ":25%", "max_pairs": 4})
    counts = outcomes(pairs)
    assert counts[""] + counts["no common prompt"] == 4 and counts["over max_pairs"] == 6


# ---- mixing --------------------------------------------------------------------------------------------------------


def test_sources_without_weights_are_concatenated(read):
    write_lines("x.jsonl", rows_of(2))
    write_lines("y.jsonl", rows_of(1))
    assert read("y.jsonl", "x.jsonl")["id"][:] == ["y.jsonl:1", "x.jsonl:1", "x.jsonl:2"]


@pytest.mark.parametrize(
    ("available", "weights", "counts"),
    [
        ([100, 40, 1000], [1, 1, 1], [40, 40, 40]),
        ([100, 40], [3, 1], [100, 33]),
        ([100, 40], [0.1, 0.3], [13, 40]),
        ([49], [0.1], [49]),
    ],
)
def test_mixed_counts(available, weights, counts):
    assert mixed_counts(available, weights) == counts


def test_weights_cap_the_sources_that_are_not_scarcest(read):
    write_lines("x.jsonl", rows_of(10))
    write_lines("y.jsonl", rows_of(30))
    mix = [{"path": "x.jsonl", "weight": 1}, {"path": "y.jsonl", "weight": 2}]
    pairs = read(*mix)
    used = pairs.filter(lambda row: not row["deselected"])
    assert Counter(used["source"][:]) == {"x": 10, "y": 20}
    assert len(set(used["id"][:])) == 30
    assert outcomes(pairs) == {"": 30, "over mixing weight": 10}
    assert read(*mix)["deselected"][:] == pairs["deselected"][:] != read(*mix, seed=1)["deselected"][:]


def test_a_weight_that_leaves_a_source_without_pairs(read):
    write_lines("x.jsonl", rows_of(1))
    write_lines("y.jsonl", rows_of(5))
    message = error_of(read, {"path": "x.jsonl", "weight": 9}, {"path": "y.jsonl", "weight": 1})
    assert message == "the weights leave a source without pairs: x (weight 9) gets 1 of 1, y (weight 1) gets 0 of 5"
