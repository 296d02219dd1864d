"""What is missing is computed once, with the first pair that has it, whatever else the pairs share."""

from types import SimpleNamespace

import numpy as np

from hafrm_ds.data.content_keys import KEY_DTYPE
from hafrm_ds.reference.offline_pass import PairSet, Responses, StoredValues, Work

NONE = np.nan


def pairs_of(contents: list[tuple[int, int]]):
    """Prepared pairs as far as they are asked here; a content is a number, and its response has as many tokens."""
    keys = np.zeros((len(contents), 2), KEY_DTYPE)
    keys["low"] = contents
    chosen, rejected = np.array(contents).T
    lengths = {"prompt": np.full(len(contents), 100), "chosen": chosen, "rejected": rejected}

    class Pairs(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.keys)

    return Pairs(keys=keys, lengths=lengths)


def stored(sets: list[PairSet], known: dict[int, float]) -> StoredValues:
    tables = [np.full((len(each.pairs), 2), NONE, np.float32) for each in sets]
    responses = Responses.of(sets)
    values = np.array([known.get(int(key["low"]), NONE) for key in responses.keys], np.float32)
    responses.into(tables, values)
    return StoredValues(tables, len(values), int(np.isnan(values).sum()))


def test_only_what_is_missing_is_asked_for_and_finds_its_way_back():
    sets = [
        PairSet(pairs_of([(1, 2), (3, 4), (5, 1), (9, 9)]), np.array([0, 1, 2])),
        PairSet(pairs_of([(4, 6), (2, 5)]), np.arange(2)),
    ]
    found = stored(sets, {1: -1.0, 2: -2.0, 4: -4.0})
    assert (found.num_wanted, found.num_missing) == (6, 3)
    np.testing.assert_array_equal(found.tables[0], [[-1, -2], [NONE, -4], [NONE, -1], [NONE, NONE]])
    np.testing.assert_array_equal(found.tables[1], [[-4, NONE], [-2, NONE]])

    work, every = found.missing(sets), Responses.of(sets)
    assert work.num_tokens(np.arange(len(work))) == [3, 5, 6]
    whole = Work.missing(every, every.out_of(found.tables))  # as if all responses were looked at
    assert work.keys(np.arange(3)).tolist() == whole.keys(np.arange(3)).tolist()
    assert work.costs("shared_prefix").tolist() == whole.costs("shared_prefix").tolist() == [103, 105, 106]

    values = work.responses.out_of(found.tables)
    values[work.places(np.arange(3))] = [-3, -5, -6]
    work.responses.into(found.tables, values)
    np.testing.assert_array_equal(found.tables[0], [[-1, -2], [-3, -4], [-5, -1], [NONE, NONE]])
    np.testing.assert_array_equal(found.tables[1], [[-4, -6], [-2, -5]])


def test_nothing_is_missing():
    sets = [PairSet(pairs_of([(1, 2)]), np.arange(1))]
    found = stored(sets, {1: -1.0, 2: -2.0})
    assert found.num_missing == 0 and len(found.missing(sets)) == 0
