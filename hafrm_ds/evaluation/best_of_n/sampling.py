"""Candidates sampled from a policy: N different answers to each prompt, on any number of processes.

A job that was killed resumes with the parts that are missing.

    PROMPTS.jsonl -> parts of PART prompts -> OUTPUT/candidates.parts/part-NNNNNN.jsonl -> OUTPUT/candidates.jsonl

As in HAF-RM's published code: each draw has a temperature of its own, exact duplicates are dropped, and a prompt is
dropped where 2 N draws have not given N different answers. Temperatures and random numbers depend on the seed and the
place of the prompt in its file alone.
"""

import gc
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import jinja2
import numpy as np
import torch
from pydantic import Field
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hafrm_ds.config import Positive, PositiveInt
from hafrm_ds.data.files import file_table
from hafrm_ds.data.formats import refuse_lost
from hafrm_ds.data.formats.answers import earlier_turns
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message, Row
from hafrm_ds.data.rendering_check import is_serious
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.options import Section
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import stamp, work_through
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.classifier import SavedClassifier
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.opening import identity_of_model, open_model
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.scoring.rows import BESIDE, json_line, prompt_of

PART = 16
SAMPLING_FILE = "sampling.json"
# Why a prompt is dropped.
TOO_FEW = "too few different answers"
TOO_LONG = "longer than the policy takes with max_new_tokens"
REFUSED = "the policy's template refuses it"
LEFT_OUT = "the policy's template leaves out a part of it"


class SamplingOptions(Section):
    """How candidates are sampled, in place of --candidates."""

    prompts: Path
    """A file with prompts."""
    policy: str
    """Who answers: a folder or hub id with a causal LM."""
    num_candidates: Annotated[int, Field(ge=2)] = 8
    """Different answers to each prompt; at most twice as many are drawn."""
    temperature: tuple[Positive, Positive] = (0.5, 1.2)
    """LOW HIGH: uniform between these, anew for each answer."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Draw from the most probable tokens that together have this probability."""
    max_new_tokens: PositiveInt = 512
    """Longest answer in tokens; longer ones are truncated."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws."""
    sampler: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vLLM on a GPU where it is installed."""
    policy_chat_template: str | None = None
    """Name or file of a template, for a policy without one."""

    def contradictions(self) -> list[str]:
        low, high = self.temperature
        return [] if low <= high else [f"--temperature {low} {high}: the lower of the two comes first"]


class Request(NamedTuple):
    """Draws from one prompt: one for each temperature."""

    prompt_ids: list[int]
    temperatures: tuple[float, ...]
    seed: int


class Answer(NamedTuple):
    """ended: by the policy itself, not by max_new_tokens."""

    text: str
    ended: bool


class Sampler(Protocol):
    def answers(self, requests: list[Request]) -> list[list[Answer]]:
        """The answers to each request, one for each of its temperatures."""


@dataclass(frozen=True)
class SamplingJob:
    """What is to be sampled. Build it with `open`.

    sampler: "transformers" or "vllm". formatter: of the policy. rows: of the prompts. encoded: ids of each prompt, or
    why it is dropped.
    """

    options: SamplingOptions
    sampler: str
    policy: SavedModel | SavedPolicy
    formatter: ChatFormatter
    rows: list[Row]
    encoded: list[list[int] | str]

    @classmethod
    def open(cls, options: SamplingOptions, **how: Any) -> "SamplingJob":
        """Open the policy without its weights, and read the prompts.

        Args:
            how: dtype, trust_remote_code and trust_pickle of `open_model`.

        Raises:
            DataError: the prompts cannot be used, or the policy has no embedding for their tokens. ModelError: the
                policy or the sampler cannot.
        """
        policy = open_model(options.policy, chat_template=options.policy_chat_template, **how)
        if isinstance(policy, SavedClassifier) or "logprob" not in policy.heads:
            raise ModelError(f"--policy {options.policy} has no LM head: it cannot answer")
        sampler = choose_sampler(options.sampler, policy)
        try:
            formatter = policy.formatter()
        except ModelError as error:  # it names the option of a training
            raise ModelError(str(error).replace("--data.chat_template", "--policy_chat_template")) from error
        name = str(options.prompts)
        rows = [Row(fields, f"{name}:{number}", "") for number, fields in file_table(options.prompts, name).rows()]
        if not rows:
            raise DataError(f"--prompts {name} is empty")
        for row in rows:
            if not isinstance(row.fields, dict):
                raise row.fault("the row", row.fields, "an object with a prompt")
            refuse_lost(row, ("prompt", "messages", *BESIDE), prompt_of(row))
        sizes = ModelSizes.of(options.policy, load_model_config(policy.config))
        longest = sizes.positions - options.max_new_tokens
        encoded = [encode_prompt(formatter, prompt_of(row), longest) for row in rows]
        if all(isinstance(each, str) for each in encoded):
            raise DataError(f"no prompt of {name} can be asked: {', '.join(dict.fromkeys(map(str, encoded)))}")
        sizes.check_ids((ids for ids in encoded if isinstance(ids, list)), formatter.tokenizer)
        return cls(options, sampler, policy, formatter, rows, encoded)

    def identity(self) -> dict[str, Any]:
        """What the candidates depend on."""
        settings = self.options.model_dump() | {"sampler": self.sampler, "prompts": stamp(self.options.prompts)}
        return settings | {"policy": identity_of_model(self.policy)}

    def sample(self, output: Path, processes: Processes, log: Console) -> None:
        """Write `output` (JSON lines of id, prompt, responses and ended) and SAMPLING_FILE beside it. All processes
        call this together; parts that are there are not sampled again.

        Raises:
            DataError: no prompt is left.
        """
        folder = output.with_suffix(".parts")
        parts = {
            folder / f"part-{number:06}.jsonl": range(first, min(first + PART, len(self.rows)))
            for number, first in enumerate(range(0, len(self.rows), PART))
        }

        def list_missing() -> str:
            folder.mkdir(exist_ok=True)
            return "\n".join(str(file) for file in parts if not file.exists())

        # Told by the first: a part that it has seen may be there for the others, or not, on a slow shared disk.
        todo = [Path(file) for file in processes.from_first("missing", list_missing).splitlines()]
        if len(todo) < len(parts):
            log.print(f"{len(parts) - len(todo):,} of {len(parts):,} parts of the candidates are there already")
        if todo:
            self.sample_parts({file: parts[file] for file in todo}, processes, log)
            gc.collect()  # the memory of the policy is for the reward models now
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        processes.from_first("joined", lambda: self.join(list(parts), output, log))

    def sample_parts(self, todo: dict[Path, range], processes: Processes, log: Console) -> None:
        kind = VllmSampler if self.sampler == "vllm" else TransformersSampler
        sampler = kind(self.policy, self.formatter, self.options, processes)
        work_through(
            "sampling",
            {file: len(part) for file, part in todo.items()},
            lambda file: self.sample_part(todo[file], sampler),
            processes,
            log,
            unit="prompts",
            together=False,
        )

    def sample_part(self, part: range, sampler: Sampler) -> bytes:
        """The lines of a part: of a prompt that is dropped, the reason in `dropped`."""
        options = self.options
        written = [{"id": self.rows[k].fields.get("id", self.rows[k].id)} for k in part]
        prompts: dict[int, list[int]] = {}  # by place in the part
        for place, k in enumerate(part):
            # As it stood in the file, unless other columns belong to it.
            prompt = prompt_of(self.rows[k])
            as_written = self.rows[k].fields.get("prompt")
            is_whole = as_written is not None and not earlier_turns(self.rows[k]) and "tools" not in prompt[0]
            written[place]["prompt"] = as_written if is_whole else prompt
            encoded = self.encoded[k]
            if isinstance(encoded, str):
                written[place]["dropped"] = encoded
            else:
                prompts[place] = encoded
        found: dict[int, dict[str, bool]] = {place: {} for place in prompts}
        for attempt in range(2):
            short = [place for place in prompts if len(found[place]) < options.num_candidates]
            requests = [request_for(prompts[place], part[place], attempt, options) for place in short]
            for place, drawn in zip(short, sampler.answers(requests) if requests else ()):
                for text, ended in drawn:
                    if text and text not in found[place] and len(found[place]) < options.num_candidates:
                        found[place][text] = ended
        for place, chosen in found.items():
            if len(chosen) < options.num_candidates:
                written[place]["dropped"] = TOO_FEW
            else:
                written[place] |= {"responses": list(chosen), "ended": list(chosen.values())}
        return b"".join(map(json_line, written))

    def join(self, parts: list[Path], output: Path, log: Console) -> str:
        rows = [json.loads(line) for part in parts for line in part.read_bytes().splitlines()]
        kept = [row for row in rows if "dropped" not in row]
        dropped = Counter(row["dropped"] for row in rows if "dropped" in row)
        truncated = sum(row["ended"].count(False) for row in kept)
        for reason, count in sorted(dropped.items()):
            log.warn(f"{count:,} of {len(rows):,} prompts are dropped: {reason}")
        if not kept:
            raise DataError(
                f"no prompt of {self.options.prompts} has {self.options.num_candidates} candidates: "
                f"{', '.join(dropped)}; other options go with another --output_dir"
            )
        if truncated:
            total = len(kept) * self.options.num_candidates
            log.warn(f"{truncated:,} of {total:,} candidates were truncated at max_new_tokens")
        summary = {"prompts": len(rows), "dropped": dropped, "candidates_cut": truncated, "sampler": self.sampler}
        write_whole(output.with_name(SAMPLING_FILE), json.dumps(summary, indent=2).encode())
        write_whole(output, b"".join(map(json_line, kept)))
        shutil.rmtree(output.with_suffix(".parts"))
        return "yes"


def request_for(prompt_ids: list[int], number: int, attempt: int, options: SamplingOptions) -> Request:
    """The draws of one attempt for prompt `number` of the file."""
    numbers = np.random.default_rng([options.seed, number, attempt])
    temperatures = numbers.uniform(*options.temperature, size=options.num_candidates)
    return Request(prompt_ids, tuple(temperatures.tolist()), int(numbers.integers(2**31)))


def encode_prompt(formatter: ChatFormatter, prompt: list[Message], longest: float) -> list[int] | str:
    """Ids of a prompt of at most `longest` tokens, or why it is dropped."""
    try:
        text = formatter.render_prompt(prompt)
    except jinja2.TemplateError:
        return REFUSED
    if is_serious(formatter.left_out(prompt, text)):
        return LEFT_OUT
    [ids] = formatter.encode_rendered([text])
    return TOO_LONG if len(ids) > longest else ids


def stop_ids(eos: int | list[int] | None, formatter: ChatFormatter) -> list[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's eos."""
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    return sorted({*ids, formatter.tokenizer.eos_token_id} - {None})


# ---- samplers ------------------------------------------------------------------------------------------------------


def choose_sampler(asked: str, policy: SavedModel | SavedPolicy) -> str:
    """Raises ModelError if vLLM was asked for and cannot be used."""
    installed = importlib.util.find_spec("vllm") is not None
    if asked == "auto":
        asked = "vllm" if installed and torch.cuda.is_available() else "transformers"
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
    """Draws the answers to one prompt at a time, all at once: what a prompt gets does not depend on any other."""

    def __init__(
        self, policy: SavedModel | SavedPolicy, formatter: ChatFormatter, options: SamplingOptions, processes: Processes
    ):
        processes.use_device()
        # The padded layout runs under the model's own attention, which can keep a cache.
        policy = replace(policy, metadata=policy.metadata | {"layout": "padded"})
        self.model = policy.hybrid_model(processes.device).causal_lm.to(processes.device)
        self.tokenizer = formatter.tokenizer
        self.stop_ids = stop_ids(self.model.generation_config.eos_token_id, formatter)
        # Instead of the model's own, which may bring penalties and a top_k.
        self.model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.stop_ids[0] if self.stop_ids else 0,
        )

    def answers(self, requests: list[Request]) -> list[list[Answer]]:
        return [self.answers_to(request) for request in requests]

    @torch.no_grad()
    def answers_to(self, request: Request) -> list[Answer]:
        torch.manual_seed(request.seed)
        device = self.model.device
        ids = torch.tensor([request.prompt_ids], device=device)
        drawn = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=len(request.temperatures),
            logits_processor=LogitsProcessorList([TemperatureOfEachRow(torch.tensor(request.temperatures).to(device))]),
        )
        return [self.read(row) for row in drawn[:, ids.shape[1] :].tolist()]

    def read(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        return Answer(self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip(), end is not None)


class VllmSampler:
    """Hands all draws to vLLM, each with a seed of its own; of several processes, each has an engine on its own GPU.

    vLLM ends answers as the policy's generation config and tokenizer say. It promises the same answer to the same seed
    only as far as its kernels do not depend on what else they compute.
    """

    def __init__(
        self, policy: SavedModel | SavedPolicy, formatter: ChatFormatter, options: SamplingOptions, processes: Processes
    ):
        import vllm

        self.options, self.params = options, vllm.SamplingParams
        with only_own_gpu(processes):
            self.engine = vllm.LLM(
                model=str(policy.folder), dtype=policy.config.dtype, trust_remote_code=policy.config.trust_remote_code
            )

    def answers(self, requests: list[Request]) -> list[list[Answer]]:
        prompts, params = [], []
        for request in requests:
            for draw, temperature in enumerate(request.temperatures):
                prompts.append({"prompt_token_ids": request.prompt_ids})
                params.append(
                    self.params(
                        temperature=temperature,
                        top_p=self.options.top_p,
                        max_tokens=self.options.max_new_tokens,
                        seed=request.seed + draw,
                    )
                )
        drawn = iter([result.outputs[0] for result in self.engine.generate(prompts, params, use_tqdm=False)])
        return [[self.read(next(drawn)) for _ in request.temperatures] for request in requests]

    @staticmethod
    def read(drawn: Any) -> Answer:
        return Answer(drawn.text.strip(), drawn.finish_reason == "stop")


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
