"""Candidates sampled from a policy: N different answers to each prompt, on any number of processes.

A job that was killed resumes with the parts that are missing.

    PROMPTS.jsonl -> parts of PART prompts -> OUTPUT/candidates.parts/part-NNNNNN.jsonl -> OUTPUT/candidates.jsonl

As in HAF-RM's published code: each draw has a temperature of its own, exact duplicates are dropped, and a prompt is
dropped where 2 N draws have not given N different answers. Temperatures and random numbers depend on the seed and the
place of the prompt in its file alone. Prompts of a part are drawn together, so that in bfloat16 an answer depends on
them by its rounding, but never on the number of processes or on what was killed.
"""

import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Row
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.evaluation.best_of_n.options import SamplingOptions
from hafrm_ds.generation.prompts import encode_prompt
from hafrm_ds.generation.samplers import SAMPLERS, Request, Sampler, choose_sampler
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import stamp, work_through
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.classifier import SavedClassifier
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.opening import identity_of_model, open_model
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.scoring.prompts import read_prompts
from hafrm_ds.scoring.rows import json_line, prompt_as_written

PART = 16
SAMPLING_FILE = "sampling.json"
TOO_FEW = "too few different answers"
"""Why a prompt is dropped that can be asked."""


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
        prompts = read_prompts("--prompts", options.prompts)
        sizes = ModelSizes.of(options.policy, load_model_config(policy.config))
        longest = sizes.positions - options.max_new_tokens
        encoded = [encode_prompt(formatter, each.messages, longest) for each in prompts]
        if all(isinstance(each, str) for each in encoded):
            raise DataError(
                f"no prompt of {options.prompts} can be asked: {', '.join(dict.fromkeys(map(str, encoded)))}"
            )
        sizes.check_ids((ids for ids in encoded if isinstance(ids, list)), formatter.tokenizer)
        return cls(options, sampler, policy, formatter, [each.row for each in prompts], encoded)

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
        if processes.is_first:
            folder.mkdir(exist_ok=True)

        def load() -> Callable[[Path], bytes]:
            sampler = SAMPLERS[self.sampler](
                self.policy,
                self.formatter,
                processes,
                max_new_tokens=self.options.max_new_tokens,
                top_p=self.options.top_p,
            )
            return lambda file: self.sample_part(parts[file], sampler)

        work_through(
            "sampling",
            {file: len(part) for file, part in parts.items()},
            load,
            processes,
            log,
            unit="prompts",
            together=False,
            what="parts of the candidates",
        )
        gc.collect()  # the memory of the policy is for the reward models now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        processes.from_first("joined", lambda: self.join(parts, output, log))

    def sample_part(self, part: range, sampler: Sampler) -> bytes:
        """The lines of a part: of a prompt that is dropped, the reason in `dropped`."""
        options = self.options
        written = [{"id": self.rows[k].fields.get("id", self.rows[k].id)} for k in part]
        prompts: dict[int, list[int]] = {}  # by place in the part
        for place, k in enumerate(part):
            written[place]["prompt"] = prompt_as_written(self.rows[k])
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
                for answer in drawn:
                    text = answer.text
                    if text and text not in found[place] and len(found[place]) < options.num_candidates:
                        found[place][text] = answer.ended
        for place, chosen in found.items():
            if len(chosen) < options.num_candidates:
                written[place]["dropped"] = TOO_FEW
            else:
                written[place] |= {"responses": list(chosen), "ended": list(chosen.values())}
        return b"".join(map(json_line, written))

    def join(self, parts: Iterable[Path], output: Path, log: Console) -> None:
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


def request_for(prompt_ids: list[int], number: int, attempt: int, options: SamplingOptions) -> Request:
    """The draws of one attempt for prompt `number` of the file."""
    numbers = np.random.default_rng([options.seed, number, attempt])
    temperatures = numbers.uniform(*options.temperature, size=options.num_candidates)
    return Request(prompt_ids, tuple(temperatures.tolist()), int(numbers.integers(2**31)))
