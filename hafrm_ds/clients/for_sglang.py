"""Answers and their rewards from one engine: an SGLang server that holds the policy of a trained model.

    python -m sglang.launch_server --model-path runs/mine/final --return-hidden-states-mode last

    engine = Engine.open("runs/mine/final", "http://127.0.0.1:30000")
    answers = engine.answers(messages, 8, temperature=0.8, max_new_tokens=512)
    scores = engine.scores([[*messages, {"role": "assistant", "content": answer}] for answer in answers])

The body runs in SGLang and the reward head, one vector, here. The states that come with generated text are of no use
for it: the reward is read at the last token of the whole rendered conversation, which decoding never computes, as it
ends when its last token is drawn, and what the template closes an answer with comes later. So each conversation is sent
again, whole, of which SGLang has all but the end in its cache, and its last state is asked for.

Written after the sources of SGLang 0.5.23, and tested against an imitation of its `/generate` alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hafrm_ds.clients.client import RewardClient, RewardError
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.tool_calls import conversation_of
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.rewards.reward import Score
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.scorer import DEFAULT_MAX_TOKENS, NO_REWARD, Conversation, encode_for

AT_ONCE = 64
"""Requests that are under way together; SGLang batches them itself."""


@dataclass(frozen=True)
class Engine:
    """A server, and what this side knows of the model that it holds.

    weight: [H] fp32, of the reward head. bias: of it.
    """

    client: RewardClient
    formatter: ChatFormatter
    sizes: ModelSizes
    weight: Tensor
    bias: float
    max_tokens: int

    @classmethod
    def open(
        cls, model: str | Path, url: str | None = None, key: str | None = None, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> "Engine":
        """Read the reward head and the tokenizer of a training's final/, which the server holds too.

        Raises:
            ModelError: the folder is none that a training has left, or its reward head was not trained.
        """
        saved = SavedModel.open(model)
        if "reward" not in saved.heads:
            raise ModelError(NO_REWARD)
        sizes = ModelSizes.of(str(model), load_model_config(saved.config))
        head = {name: tensor.float() for name, tensor in saved.head.items()}
        bias = head["bias"].item() if "bias" in head else 0.0
        return cls(RewardClient.of(url, key), saved.formatter(), sizes, head["weight"].flatten(), bias, max_tokens)

    def answers(self, messages: Conversation, number: int = 1, **sampling: Any) -> list[str]:
        """Draw answers of the policy. sampling: SGLang's sampling_params, as temperature. Raises RewardError, and
        DataError if `messages` are none."""
        sampling["n"] = number
        prompt = conversation_of(messages, "the prompt")
        asked = {"input_ids": self.formatter.encode_prompt(prompt), "sampling_params": sampling}
        drawn = self.client.post("/generate", asked)
        return [each["text"].strip() for each in (drawn if isinstance(drawn, list) else [drawn])]

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        """The reward of each conversation, in order; one that cannot be read has an error instead. Raises RewardError
        if the server does not answer."""
        with ThreadPool(AT_ONCE) as pool:  # an error leaves it without waiting for the others
            return list(pool.imap(self.score, conversations))

    def score(self, conversation: Conversation) -> Score:
        try:
            read = conversation_of(conversation, "the conversation")
            ids = encode_for(self.sizes, self.formatter, read, self.max_tokens)
        except DataError as error:
            return Score.none(str(error))
        [answer] = ids.responses
        asked = {
            "input_ids": [*map(int, ids.prompt), *map(int, answer)],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_hidden_states": "last",
        }
        state = last_state(self.client.post("/generate", asked), len(self.weight))
        value = (state @ self.weight).item() + self.bias
        return Score(value) if math.isfinite(value) else Score.none("the score is not finite")


def last_state(answer: Any, hidden_size: int) -> Tensor:
    """[H] fp32, of the last token that was sent. Raises RewardError where there is none."""
    try:
        return torch.tensor(answer["meta_info"]["hidden_states"], dtype=torch.float32).reshape(hidden_size)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"the server has sent no hidden state of size {hidden_size}: it needs --return-hidden-states-mode last, "
            "and the model of this folder"
        ) from error
