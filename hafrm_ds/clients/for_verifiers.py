"""A reward for verifiers, and so for prime-rl, which asks launch/serve.py:

vf.Rubric(funcs=[hafrm_reward])
"""

from typing import Any

from hafrm_ds.clients.client import RewardClient


async def hafrm_reward(
    prompt: str | list[dict], completion: str | list[dict], answer: Any = None, info: Any = None, state: Any = None
) -> float:
    """Raises RewardError if there is no reward."""
    (value,) = await RewardClient.of().scores_async([{"prompt": prompt, "response": completion}])
    return value
