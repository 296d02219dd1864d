"""The questions of benchmarks as token ids: truncated as training truncates its pairs, and what cannot be asked left
out."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.tokenization import PromptWithResponses, tokenize_conversation, truncate_prompt
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.benchmarks.benchmark import Benchmark, Question
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.sets import longest_conversation, sizes_of
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import Saved


@dataclass
class EvaluatedBenchmark:
    """Questions of a benchmark, and the groups of each: its responses in order, with their prompt (`encode_question`).
    num_cut: of these lost the start of their prompt, or the end of an answer. left_out: why questions are not among
    them, one text for each."""

    benchmark: Benchmark
    questions: list[Question] = field(default_factory=list)
    groups: list[list[PromptWithResponses]] = field(default_factory=list)
    num_cut: int = 0
    left_out: list[str] = field(default_factory=list)

    @property
    def missing_share(self) -> float:
        return len(self.left_out) / (len(self.left_out) + len(self.questions))

    def conversations(self) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
        """Prompt and response of every conversation, question by question."""
        return [
            [(group.prompt, response) for group in groups for response in group.responses] for groups in self.groups
        ]


def read_benchmarks(
    options: EvaluationOptions, saved: Saved, formatter: ChatFormatter, processes: Processes
) -> dict[str, EvaluatedBenchmark]:
    """Read and tokenise the questions of every benchmark that was asked for.

    Raises:
        DataError, ModelError: none of its questions can be asked, or the model has no embedding for their tokens.
    """
    sizes = sizes_of(saved)
    max_length = int(min(options.max_length or math.inf, longest_conversation(options, saved)))
    found = {}
    for name, path in options.benchmarks.items():
        benchmark = BENCHMARKS[name]
        read = partial(benchmark.read, path or benchmark.default_path, None)
        evaluated = EvaluatedBenchmark(benchmark)
        for each in processes.in_turns(f"benchmark {name}", read):
            try:
                groups, was_cut = encode_question(
                    formatter, each.id, each.prompt, each.responses, max_length, cut_answers=options.misfits == "cut"
                )
            except DataError as error:
                evaluated.left_out.append(str(error))
                continue
            evaluated.questions.append(each)
            evaluated.groups.append(groups)
            evaluated.num_cut += was_cut
        if not evaluated.questions:
            raise DataError(f"no question of {benchmark.title} can be asked, the first because {evaluated.left_out[0]}")
        ids = (ids for groups in evaluated.groups for group in groups for ids in (group.prompt, *group.responses))
        sizes.check_ids(ids, formatter.tokenizer)
        found[name] = evaluated
    return found


def encode_question(
    formatter: ChatFormatter,
    place: str,
    prompt: list[Message],
    responses: list[list[Message]],
    max_length: int,
    cut_answers: bool = False,
) -> tuple[list[PromptWithResponses], bool]:
    """The groups of a question: its responses in order, and whether anything was truncated.

    They are one group, or several where the tokenizer merges the first token of some responses with the prompt's last.

    A conversation of more than `max_length` tokens loses the start of its prompt, as data.truncation keep_prompt_end
    does it: a leading BOS stays. All answers keep the same prompt, truncated for the longest.

    Args:
        cut_answers: an answer that is too long by itself loses its end, beside the last token of the prompt.

    Raises:
        DataError: naming `place`, for a conversation that cannot be rendered, or an answer that is too long by itself.
    """
    try:
        conversations = [tokenize_conversation(formatter, [*prompt, *response]) for response in responses]
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    excess = max(ids.longest_conversation for ids in conversations) - max_length
    if excess <= 0:
        return groups_of(conversations), False
    bos = formatter.tokenizer.bos_token_id
    prompts = [truncate_prompt(ids.prompt, excess, bos) for ids in conversations]
    truncated = [ids._replace(prompt=prompt) for ids, prompt in zip(conversations, prompts) if prompt is not None]
    if len(truncated) == len(conversations):
        return groups_of(truncated), True
    kept = conversations[0].prompt[:1] if conversations[0].prompt[0] == bos else []
    room = max_length - len(kept) - 1
    if cut_answers and room > 0:
        cut = [PromptWithResponses([*kept, *ids.prompt[-1:]], (ids.responses[0][:room],)) for ids in conversations]
        return groups_of(cut), True
    raise DataError(
        f"{place}: an answer leaves no room for its prompt in {max_length:,} tokens, the least of --max_length, "
        "--max_tokens_per_micro_batch and the positions that the model knows"
    )


def groups_of(conversations: list[PromptWithResponses]) -> list[PromptWithResponses]:
    """Groups of one response -> neighbours with the same prompt put together, in order."""
    return [
        PromptWithResponses(prompt, tuple(response for _, responses in members for response in responses))
        for prompt, members in itertools.groupby(conversations, key=lambda ids: ids.prompt)
    ]
