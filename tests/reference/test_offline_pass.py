"""What is missing is computed once, with the first group that has it, whatever else the groups share."""

from types import SimpleNamespace

import numpy as np

from hafrm_ds.config import BatchConfig
from hafrm_ds.data.content_keys import KEY_DTYPE
from hafrm_ds.data.lengths import GroupLengths, starts_of
from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.reference.offline_pass import GroupSet, Responses, StoredValues, Work

NONE = np.nan
BATCH = BatchConfig(layout="shared_prefix", max_tokens_per_micro_batch=1000)


def groups_of(contents: list[tuple[int, ...]]):
    """Prepared groups as far as they are asked here; a content is a number, and its response has as many tokens."""
    every = np.array([content for group in contents for content in group], dtype=np.int64)
    keys = np.zeros(len(every), KEY_DTYPE)
    keys["low"] = every
    sizes = np.array([len(group) for group in contents])

    class Groups(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.lengths)

        def __getitem__(self, index: int) -> TokenizedGroup:
            return TokenizedGroup([0] * 100, tuple([number] * number for number in contents[index]), OF_A_PAIR, "", "")

    return Groups(keys=keys, lengths=GroupLengths(np.full(len(contents), 100), every, starts_of(sizes)))


def stored(sets: list[GroupSet], known: dict[int, float]) -> StoredValues:
    tables = [np.full(len(each.groups.keys), NONE, np.float32) for each in sets]
    responses = Responses.of(sets)
    values = np.array([known.get(int(key["low"]), NONE) for key in responses.keys], np.float32)
    responses.into(tables, values)
    return StoredValues(tables, len(values), int(np.isnan(values).sum()))


def test_only_what_is_missing_is_asked_for_and_finds_its_way_back():
    sets = [
        GroupSet(groups_of([(1, 2), (3, 4), (5, 1), (9, 9)]), np.array([0, 1, 2])),
        GroupSet(groups_of([(4, 6), (2, 5)]), np.arange(2)),
    ]
    found = stored(sets, {1: -1.0, 2: -2.0, 4: -4.0})
    assert (found.num_wanted, found.num_missing) == (6, 3)
    np.testing.assert_array_equal(found.tables[0], [-1, -2, NONE, -4, NONE, -1, NONE, NONE])
    np.testing.assert_array_equal(found.tables[1], [-4, NONE, -2, NONE])

    work, every = found.missing(sets, BATCH), Responses.of(sets)
    assert work.num_tokens(np.arange(len(work))) == [3, 5, 6]
    whole = Work.missing(every, every.out_of(found.tables), "shared_prefix", 1000)  # as if all responses were looked at
    assert work.keys(np.arange(3)).tolist() == whole.keys(np.arange(3)).tolist()
    assert work.lengths.costs("shared_prefix").tolist() == [103, 105, 106]
    assert whole.lengths.costs("shared_prefix").tolist() == [103, 105, 106]

    values = work.responses.out_of(found.tables)
    values[work.places(np.arange(3))] = [-3, -5, -6]
    work.responses.into(found.tables, values)
    np.testing.assert_array_equal(found.tables[0], [-1, -2, -3, -4, -5, -1, NONE, NONE])
    np.testing.assert_array_equal(found.tables[1], [-4, -6, -2, -5])


def test_nothing_is_missing():
    sets = [GroupSet(groups_of([(1, 2)]), np.arange(1))]
    found = stored(sets, {1: -1.0, 2: -2.0})
    assert found.num_missing == 0 and len(found.missing(sets, BATCH)) == 0


def test_answers_of_a_group_are_computed_beside_one_another_as_far_as_the_budget_goes():
    """Only those that are missing, each with the first group that has it."""
    sets = [GroupSet(groups_of([(7, 8), (1, 2, 3, 4, 5), (3, 6, 9)]), np.array([1, 2]))]
    found = stored(sets, {4: -4.0})
    assert (found.num_wanted, found.num_missing) == (7, 6)
    for max_tokens, expected in ((1000, [[1, 2, 3, 5], [6, 9]]), (107, [[1, 2, 3], [5], [6], [9]])):
        batch = BATCH.model_copy(update={"max_tokens_per_micro_batch": max_tokens})
        work = found.missing(sets, batch)
        items = [[len(response) for response in work.item(place).responses] for place in range(len(work))]
        assert items == expected
        assert work.items("shared_prefix").num_responses.tolist() == [len(each) for each in items]
        every = np.arange(len(work))
        assert work.num_tokens(every) == [1, 2, 3, 5, 6, 9]
        assert work.keys(every)["low"].tolist() == [1, 2, 3, 5, 6, 9]
        values = work.responses.out_of(found.tables)
        values[work.places(every)] = [-1, -2, -3, -5, -6, -9]
        tables = [table.copy() for table in found.tables]
        work.responses.into(tables, values)
        np.testing.assert_array_equal(tables[0], [NONE, NONE, -1, -2, -3, -4, -5, -3, -6, -9])
