"""A reward for OpenRLHF as a file: `--reward.remote_url PATH_OF_THIS_FILE`. It asks launch/serve.py, as the URL itself
would, with more retries and with the key in a header.

OpenRLHF catches what a reward raises, logs it, and goes on with a sample without a reward.
"""

from typing import Any

from hafrm_ds.clients.client import RewardClient, RewardError


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Raises RewardError if one of them has no reward."""
    client = RewardClient.of()
    answer = client.post("/get_reward", {"query": queries, "prompts": prompts, "labels": labels})
    if "error" in answer or len(answer.get("rewards", ())) != len(queries):
        raise RewardError(f"{client.url}: {answer.get('error', 'has not answered for each query')}")
    return answer
