"""A reward for SkyRL: an environment that asks launch/serve.py, one turn long.

skyrl_gym.register(id="hafrm", entry_point="hafrm_ds.clients.for_skyrl:HafrmEnv")
"""

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from hafrm_ds.clients.client import RewardClient


class HafrmEnv(BaseTextEnv):
    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None):
        super().__init__()
        self.client = RewardClient.of()
        self.prompt: list[dict] = []

    def init(self, prompt: list[dict]) -> tuple[list[dict], dict[str, Any]]:
        self.prompt = prompt
        return prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Raises RewardError if there is no reward."""
        (reward,) = self.client.scores([{"prompt": self.prompt, "response": action}])
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})
