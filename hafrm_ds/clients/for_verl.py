"""A reward for verl, which asks launch/serve.py.

    reward.custom_reward_function.path=pkg://hafrm_ds.clients.for_verl    (or the path of this file)
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.url=http://HOST:5000

verl does not hand on the prompt: the data set's extra_info must hold it, as `prompt` (a text or messages).
"""

from typing import Any

from hafrm_ds.clients.client import RewardClient, RewardError


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    url: str | None = None,
    key: str | None = None,
    **more: Any,
) -> float:
    """Raises RewardError if there is no reward."""
    prompt = (extra_info or {}).get("prompt")
    if prompt is None or len(prompt) == 0:
        raise RewardError(f"extra_info of a row of {data_source} has no prompt: add it to the data set")
    messages = prompt if isinstance(prompt, str) else list(prompt)  # parquet gives an array
    (value,) = await RewardClient.of(url, key).scores_async([{"prompt": messages, "response": solution_str}])
    return value
