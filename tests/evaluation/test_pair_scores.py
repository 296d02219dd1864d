"""What an evaluation keeps of every pair."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from hafrm_ds.data.report import Example
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.pair_scores import PairScores, load_all
from tests.evaluation.groups import group_scores
from tests.test_objective import FIT

REWARD = np.array([[2.0, 1.0], [-1.0, 0.0], [0.5, 0.5], [-4.0, 3.0]], dtype=np.float32)
LOGPROB = np.array([[-8.0, -9.0], [-7.0, -5.0], [-6.0, -6.0], [-1.0, -2.0]], dtype=np.float32)


def scored(name: str = "a set", **scores) -> PairScores:
    return PairScores(
        set=name,
        step=3,
        beta=0.5,
        ids=[f"file:{n}" for n in range(4)],
        sources=["one", "one", "two", "two"],
        prompts=["x", "x", "y", "z"],
        num_tokens=np.array([[3, 4], [5, 6], [7, 8], [1, 2]]),
        **scores,
    )


def test_the_judges_are_what_was_scored():
    assert scored(reward=REWARD).judges.keys() == {"reward"}
    assert scored(logprob=LOGPROB).judges.keys() == {"logprob"}
    scores = scored(reward=REWARD, logprob=LOGPROB, reference=LOGPROB - np.float32([2.0, 0.0]))
    assert list(scores.judges) == ["reward", "implicit", "logprob"]
    np.testing.assert_array_equal(scores.judges["implicit"], [[1.0, 0.0]] * 4)
    np.testing.assert_array_equal(scores.margins("reward"), [1.0, -1.0, 0.0, -7.0])


def test_mistakes_are_the_wrong_pairs_the_most_confident_first_and_no_ties():
    assert scored(reward=REWARD).mistakes() == [3, 1]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    scores = scored("a/b: ä", reward=REWARD, logprob=LOGPROB, reference=LOGPROB, combined=REWARD + 1, fit=FIT)
    scores.texts = {3: Example("file:3", "two", "Why?", "Because.", "\x00 <b>")}
    scores.save(tmp_path)
    only_reward = scored("other", reward=REWARD)
    only_reward.save(tmp_path)
    loaded = load_all(tmp_path)
    assert loaded.keys() == {"a/b: ä", "other"}
    assert loaded["other"].logprob is None and loaded["other"].texts == {}
    again = loaded["a/b: ä"]
    assert (again.step, again.beta, again.ids, again.sources, again.prompts, again.texts) == (
        (3, 0.5, scores.ids, scores.sources, scores.prompts, scores.texts)
    )
    for name in ("num_tokens", "reward", "logprob", "reference", "combined"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name))
    assert again.fit == scores.fit and loaded["other"].fit is None
    assert list(again.judges) == ["reward", "implicit", "logprob", "combined"]


def test_a_file_of_pairs_has_no_column_of_groups(tmp_path):
    scored(reward=REWARD).save(tmp_path)
    names = pq.read_table(tmp_path / "a%20set.parquet").column_names
    sides = [f"{name}_{side}" for side in ("chosen", "rejected") for name in ("tokens", "reward")]
    assert names == ["id", "source", "prompt_key", *sides, "prompt", "chosen", "rejected"]
    loaded = load_all(tmp_path)["a set"]
    assert loaded.groups is None and loaded.answers.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(loaded.answers.values(loaded.reward), REWARD.reshape(-1))


def test_groups_are_saved_and_each_answer_is_known_once(tmp_path):
    rewards = [1.0, 3.0, 2.0]
    scores = group_scores([([(1, 0), (1, 2)], rewards), ([(0, 2)], rewards)])
    scores.groups = dataclasses.replace(scores.groups, target=np.float32([1, 0.75, 1]), weight=np.float32([1, 2, 1]))
    scores.save(tmp_path)
    loaded = load_all(tmp_path)["set"]
    for name in ("number", "answers", "target", "weight"):
        np.testing.assert_array_equal(getattr(loaded.groups, name), getattr(scores.groups, name))
    assert loaded.answers.group.tolist() == [0, 0, 0, 1, 1]
    assert loaded.answers.values(loaded.reward).tolist() == [1, 3, 2, 1, 2]


def test_another_file_is_refused_by_name(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing of that kind")
    with pytest.raises(DataError, match=r"x\.parquet holds no scores of an evaluation"):
        load_all(tmp_path)
