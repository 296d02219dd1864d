"""A reward for ms-swift: `--external_plugins PATH_OF_THIS_FILE --reward_funcs hafrm`. It asks launch/serve.py.

The prompt is the column `messages`, of which a last message of the assistant is left out.
"""

from typing import Any

from hafrm_ds.clients.client import RewardClient

try:
    from swift.rewards import AsyncORM, orms
except ImportError:  # before 4.0
    from swift.plugin import AsyncORM, orms


class HafrmReward(AsyncORM):
    async def __call__(self, completions: list[str], messages: list[list[dict]], **columns: Any) -> list[float]:
        """Raises RewardError if one of them has no reward."""
        rows = [
            {"prompt": turns[:-1] if turns[-1]["role"] == "assistant" else turns, "response": completion}
            for turns, completion in zip(messages, completions, strict=True)
        ]
        return await RewardClient.of().scores_async(rows)


orms["hafrm"] = HafrmReward
