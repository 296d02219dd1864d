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
ROWS = 64
"""Answers that transformers draws at once. The weights are read once for all of them, which is what a step costs."""


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
        """The answers to each request, one for each of its temperatures. One depends on what else is asked in the same
        call by rounding alone."""


def one_each(
    sampler: Sampler, prompts: Sequence[Sequence[int]], temperature: float = GREEDY, seed: int = 0
) -> list[Answer]:
    """One answer to each prompt. The first is drawn with `seed`, each other with the next one."""
    requests = [Request(list(ids), (temperature,), seed + place) for place, ids in enumerate(prompts)]
    return [answer for [answer] in sampler.answers(requests)]


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


class Draw(NamedTuple):
    """One answer to be drawn. numbers: uniform from 0 to 1, one for each token."""

    prompt_ids: list[int]
    temperature: float
    numbers: torch.Tensor


FEW = 1024
"""Tokens among which a nucleus is looked for first: to sort a whole vocabulary costs as much as the model's step."""


class DrawOfEachRow(LogitsProcessor):
    """Leaves one token of each row's logits [rows, V]: the one into whose share of the cumulated probabilities the
    next random number of the row falls. So its tokens depend on no other row.

    Args:
        temperatures: [rows]. Of GREEDY the most probable token is left.
        numbers: [rows, steps], uniform from 0 to 1.
        top_p: draw from the most probable tokens that together have this probability.
    """

    def __init__(self, temperatures: torch.Tensor, numbers: torch.Tensor, top_p: float):
        self.is_greedy = temperatures == GREEDY
        self.temperatures = temperatures.masked_fill(self.is_greedy, 1.0)
        self.numbers = iter(numbers.unbind(1))
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probs = (scores / self.temperatures[:, None]).softmax(-1)
        if self.top_p < 1:
            probs = probs.masked_fill(probs < self.least_probable(probs), 0.0)
        sums = probs.cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(sums, next(self.numbers)[:, None] * sums[:, -1:], right=True)
        drawn = torch.where(self.is_greedy[:, None], scores.argmax(-1, keepdim=True), drawn)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    def least_probable(self, probs: torch.Tensor) -> torch.Tensor:
        """The probability [rows, 1] of the last token of each nucleus. What is as probable is in it, too: which of
        them a sort puts first is chance."""
        least, mass = self.last_of(probs.topk(min(FEW, probs.shape[-1])).values)
        is_longer = mass < self.top_p
        least[is_longer], _ = self.last_of(probs[is_longer].sort(descending=True).values)
        return least[:, None]

    def last_of(self, best: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the probability of the last token in each nucleus and the sum of all that are given, both [rows].

        Args:
            best: the largest probabilities in descending order, [rows, n].
        """
        sums = best.cumsum(-1, dtype=torch.float64)
        last = (sums[:, :-1] < self.top_p).sum(-1, keepdim=True)
        return best.gather(1, last)[:, 0], sums[:, -1]


class TransformersSampler:
    """Draws up to ROWS answers at once, to as many prompts, or half as many wherever memory does not last. Each has
    random numbers of its own: what it is drawn with changes it by rounding alone."""

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
        self.max_new_tokens, self.top_p, self.rows = max_new_tokens, top_p, ROWS
        # The last state of each prompt goes into the head: a view, for which torch would copy its weights once a row.
        head = self.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: tuple(each.contiguous() for each in inputs))
        # Instead of the model's own, which may bring penalties and a top_k.
        self.model.generation_config = GenerationConfig(
            do_sample=False,  # the draw of each row leaves one token to choose from
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.pad_id,
        )

    def answers(self, requests: Sequence[Request]) -> list[list[Answer]]:
        draws: list[tuple[int, Draw]] = []
        for place, (prompt_ids, temperatures, seed) in enumerate(requests):
            generator = torch.Generator().manual_seed(seed)  # of the CPU: a GPU draws with the same numbers
            numbers = torch.rand(len(temperatures), self.max_new_tokens, generator=generator, dtype=torch.float64)
            draws += [(place, Draw(prompt_ids, *each)) for each in zip(temperatures, numbers)]
        found: list[list[Answer]] = [[] for _ in requests]
        # Prompts of like length together need the least padding. The draws of one prompt stay in their order.
        waiting = sorted(draws, key=lambda each: len(each[1].prompt_ids))
        while waiting:
            try:
                drawn = self.draw([draw for _, draw in waiting[: self.rows]])
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows = min(self.rows, len(waiting)) // 2 or 1
                continue
            for (place, _), answer in zip(waiting, drawn):
                found[place].append(answer)
            waiting = waiting[len(drawn) :]
        return found

    @torch.no_grad()
    def draw(self, draws: Sequence[Draw]) -> list[Answer]:
        """An answer for each, drawn together: their prompts are padded on the left."""
        longest = max(len(draw.prompt_ids) for draw in draws)
        device = self.model.device
        rows = [[self.pad_id] * (longest - len(draw.prompt_ids)) + draw.prompt_ids for draw in draws]
        mask = [[0] * (longest - len(draw.prompt_ids)) + [1] * len(draw.prompt_ids) for draw in draws]
        temperatures = torch.tensor([draw.temperature for draw in draws], device=device)
        processors = LogitsProcessorList()
        if temperatures.any():
            numbers = torch.stack([draw.numbers for draw in draws]).to(device)
            processors.append(DrawOfEachRow(temperatures, numbers, self.top_p))
        drawn = self.model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=processors,
        )
        return [self.read(row) for row in drawn[:, longest:].tolist()]

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
