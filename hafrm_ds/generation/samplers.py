"""Who draws the answers of a policy: transformers or vLLM."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.errors import ModelError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.policy import SavedPolicy

GREEDY = 0.0
"""The temperature at which the most probable token is taken each time."""


class Request(NamedTuple):
    """Draws from one prompt: one for each temperature."""

    prompt_ids: list[int]
    temperatures: tuple[float, ...]
    seed: int


class Answer(NamedTuple):
    """written: with the white space around it. ended: by the policy itself, not by max_new_tokens. ids: the tokens that
    were drawn, with the one that ended it."""

    written: str
    ended: bool
    ids: list[int]

    @property
    def text(self) -> str:
        return self.written.strip()


class Sampler(Protocol):
    def answers(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The answers to each request, one for each of its temperatures."""

    def one_each(self, prompts: Sequence[Sequence[int]], temperature: float = GREEDY, seed: int = 0) -> list[Answer]:
        """One answer to each prompt, drawn for all of them together: they depend on what is asked in one call."""


def stop_ids(eos: int | list[int] | None, formatter: ChatFormatter) -> list[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's eos."""
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    return sorted({*ids, formatter.tokenizer.eos_token_id} - {None})


def choose_sampler(asked: str, policy: SavedModel | SavedPolicy) -> str:
    """Raises ModelError if vLLM was asked for and cannot be used."""
    installed = importlib.util.find_spec("vllm") is not None
    if asked == "auto":
        can = installed and torch.cuda.is_available() and not isinstance(policy, SavedModel)
        asked = "vllm" if can else "transformers"
    if asked == "vllm":
        if not installed:
            raise ModelError("--sampler vllm needs vLLM: pip install vllm; or take --sampler transformers")
        if isinstance(policy, SavedModel):  # vLLM reads every safetensors file of a folder, the reward head too
            raise ModelError(
                f"vLLM cannot load {policy.folder}, which has a reward head beside the policy; give the folder that "
                "launch/export.py --format policy makes of it, or take --sampler transformers"
            )
    return asked


class TemperatureOfEachRow(LogitsProcessor):
    """Divides the logits [rows, V] by a temperature for each row."""

    def __init__(self, temperatures: torch.Tensor):
        self.temperatures = temperatures

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / self.temperatures[:, None]


class TransformersSampler:
    """Draws the answers to one prompt at a time, all at once: what a prompt gets does not depend on any other. For one
    answer to each of many prompts, their rows are padded on the left."""

    def __init__(
        self,
        policy: SavedModel | SavedPolicy,
        formatter: ChatFormatter,
        processes: Processes,
        *,
        max_new_tokens: int,
        top_p: float = 1.0,
    ):
        processes.use_device()
        # The padded layout runs under the model's own attention, which can keep a cache.
        policy = replace(policy, metadata=policy.metadata | {"layout": "padded"})
        self.model = policy.hybrid_model(processes.device).causal_lm.to(processes.device)
        self.tokenizer = formatter.tokenizer
        self.stop_ids = stop_ids(self.model.generation_config.eos_token_id, formatter)
        self.pad_id = self.stop_ids[0] if self.stop_ids else 0
        # Instead of the model's own, which may bring penalties and a top_k.
        both = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self.stop_ids or None,
            "pad_token_id": self.pad_id,
        }
        self.model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=top_p, **both)
        self.greedy = GenerationConfig(do_sample=False, **both)

    def answers(self, requests: Sequence[Request]) -> list[list[Answer]]:
        return [self.answers_to(request) for request in requests]

    @torch.no_grad()
    def one_each(self, prompts: Sequence[Sequence[int]], temperature: float = GREEDY, seed: int = 0) -> list[Answer]:
        longest = max(map(len, prompts), default=0)
        if not longest:
            return []
        torch.manual_seed(seed)
        device = self.model.device
        rows = [[self.pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        drawn = self.model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=self.greedy if temperature == GREEDY else None,
            logits_processor=self.at([temperature] * len(rows)),
        )
        return [self.read(row) for row in drawn[:, longest:].tolist()]

    def at(self, temperatures: Sequence[float]) -> LogitsProcessorList:
        """What divides the logits of each row by its temperature; nothing where all are greedy."""
        if not any(temperatures):
            return LogitsProcessorList()
        return LogitsProcessorList([TemperatureOfEachRow(torch.tensor(temperatures, device=self.model.device))])

    @torch.no_grad()
    def answers_to(self, request: Request) -> list[Answer]:
        torch.manual_seed(request.seed)
        device = self.model.device
        ids = torch.tensor([request.prompt_ids], device=device)
        drawn = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=len(request.temperatures),
            logits_processor=self.at(request.temperatures),
        )
        return [self.read(row) for row in drawn[:, ids.shape[1] :].tolist()]

    def read(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        written = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(written, end is not None, ids if end is None else ids[: end + 1])


class VllmSampler:
    """Hands all draws to vLLM, each with a seed of its own; of several processes, each has an engine on its own GPU.

    vLLM ends answers as the policy's generation config and tokenizer say. It promises the same answer to the same seed
    only as far as its kernels do not depend on what else they compute.
    """

    def __init__(
        self,
        policy: SavedModel | SavedPolicy,
        formatter: ChatFormatter,
        processes: Processes,
        *,
        max_new_tokens: int,
        top_p: float = 1.0,
    ):
        import vllm

        self.max_new_tokens, self.top_p, self.params = max_new_tokens, top_p, vllm.SamplingParams
        with only_own_gpu(processes):
            self.engine = vllm.LLM(
                model=str(policy.folder), dtype=policy.config.dtype, trust_remote_code=policy.config.trust_remote_code
            )

    def answers(self, requests: Sequence[Request]) -> list[list[Answer]]:
        prompts, params = [], []
        for request in requests:
            for draw, temperature in enumerate(request.temperatures):
                prompts.append({"prompt_token_ids": request.prompt_ids})
                params.append(
                    self.params(
                        temperature=temperature,
                        top_p=self.top_p,
                        max_tokens=self.max_new_tokens,
                        seed=request.seed + draw,
                    )
                )
        drawn = iter([result.outputs[0] for result in self.engine.generate(prompts, params, use_tqdm=False)])
        return [[self.read(next(drawn)) for _ in request.temperatures] for request in requests]

    def one_each(self, prompts: Sequence[Sequence[int]], temperature: float = GREEDY, seed: int = 0) -> list[Answer]:
        requests = [Request(list(ids), (temperature,), seed + place) for place, ids in enumerate(prompts)]
        return [answer for [answer] in self.answers(requests)]

    @staticmethod
    def read(drawn: Any) -> Answer:
        return Answer(drawn.text, drawn.finish_reason == "stop", list(drawn.token_ids))


SAMPLERS: dict[str, type[TransformersSampler] | type[VllmSampler]] = {
    "transformers": TransformersSampler,
    "vllm": VllmSampler,
}
"""By the names that `choose_sampler` gives."""


@contextmanager
def only_own_gpu(processes: Processes) -> Iterator[None]:
    """What is started meanwhile sees this process's GPU alone. vLLM's engine is a process of its own."""
    if processes.world_size == 1:
        yield
        return
    name, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ[name] = before.split(",")[processes.local_rank] if before else str(processes.local_rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
