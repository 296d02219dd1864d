"""The options of rounds: what contradicts itself, and whether ranked answers train the head."""

import pytest

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import ConfigError
from hafrm_ds.training.rounds.options import RoundsOptions

GIVEN = {
    "output_dir": "out",
    "model.name_or_path": "model",
    "data.train": "train.jsonl",
    "data.eval": "test.jsonl",
    "rounds.prompts": "prompts.jsonl",
    "rounds.evaluation_prompts": "held.jsonl",
}


def load(**changes) -> RoundsOptions:
    given = GIVEN | {name.replace("__", "."): value for name, value in changes.items()}
    return load_config([word for name, value in given.items() for word in (f"--{name}", value)], RoundsOptions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds__num_candidates": "1"}, "rounds.num_candidates"),
        ({"rounds__temperature": "[1.2, 0.5]"}, "rounds.temperature 1.2 0.5: the lower of the two comes first"),
        ({"rounds__replay": "1"}, "rounds.replay"),
        ({"rounds__reward": "x.yaml", "rounds__judge": "implicit"}, "but rounds.reward ranks in its place"),
        ({"data__eval": "{}"}, "data.eval names no set: rounds are held against pairs"),
        ({"objective__alpha": "0"}, "rounds train the policy: objective.alpha is above 0"),
        ({"objective__rm_weight": "0"}, "objective.rm_weight is 0: no reward head is trained that could rank"),
        ({"resume": "checkpoint"}, "resume: rounds always resume"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        load(**changes)


def test_the_policy_alone_is_trained_on_what_another_reward_ranks():
    assert not load(objective__rm_weight="0", rounds__reward="helpful.yaml").objective.uses_reward
    assert load(objective__rm_weight="0", rounds__judge="implicit").rounds.is_own


def test_answers_that_a_model_has_ranked_itself_do_not_train_its_head():
    assert not load().rounds.trains_head
    assert load(rounds__reward="helpful.yaml").rounds.trains_head
    assert load(rounds__reward_loss="true", rounds__replay="0").rounds.trains_head
    assert not load(rounds__reward="helpful.yaml", rounds__reward_loss="false").rounds.trains_head
