"""A reward for NeMo-RL: an environment that asks launch/serve.py, one turn long.

register_env("hafrm", "hafrm_ds.clients.for_nemo_rl.HafrmEnvironment")        # nemo_rl.environments.utils
env: {hafrm: {url: http://HOST:5000}}
"""

from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from hafrm_ds.clients.client import RewardClient


@ray.remote
class HafrmEnvironment(EnvironmentInterface):
    def __init__(self, cfg: dict[str, Any]):
        self.client = RewardClient.of(cfg.get("url"), cfg.get("key"))

    def step(self, message_log_batch: list[list[dict]], metadata: list[Any]) -> EnvironmentReturn:
        """Raises RewardError if one of them has no reward."""
        conversations = [
            [{name: turn[name] for name in ("role", "content")} for turn in log] for log in message_log_batch
        ]
        rewards = self.client.scores([{"messages": messages} for messages in conversations])
        number = len(rewards)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""}] * number,
            metadata=metadata,
            next_stop_strings=[None] * number,
            rewards=torch.tensor(rewards),
            terminateds=torch.ones(number),
            answers=[None] * number,
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        return batch, {"reward": batch["total_reward"].mean().item()}
