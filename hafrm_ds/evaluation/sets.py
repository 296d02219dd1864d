"""The sets of groups, mostly pairs, that an evaluation scores: tokenised as the model was trained, and what the
reference store of the training knows of them."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.lengths import places_of
from hafrm_ds.data.preparation import PreparationOptions, PreparedGroups, prepare_groups
from hafrm_ds.data.sources import EvalSources
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError, ModelError, in_own_names
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.pair_scores import fixed_choice
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.reference.store import Namespace, ReferenceStore
from hafrm_ds.saved.opening import Saved, trained_with

DEFAULT_TRUNCATION = "keep_prompt_end"


@dataclass(frozen=True)
class EvaluatedSet:
    """Groups of a set, and the positions [G] of those that are scored."""

    groups: PreparedGroups
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> list[PromptWithResponses]:
        return [self.groups[int(self.index[place])].ids]

    @property
    def prompts(self) -> np.ndarray:
        """[P] KEY_DTYPE, the prompt of each comparison that is scored."""
        return np.repeat(self.groups.prompt_keys[self.index], np.diff(self.groups.first_comparison)[self.index])

    def by_group(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of all responses that are scored -> those of each group."""
        sizes = self.groups.lengths.num_responses[self.index]
        return np.split(values, np.cumsum(sizes)[:-1])


def prepare_sets(
    data: EvalSources,
    *,
    options: EvaluationOptions,
    saved: Saved,
    formatter: ChatFormatter,
    processes: Processes,
    log: Console,
) -> dict[str, EvaluatedSet]:
    """Read and tokenise the groups of every set, as the model was trained unless the options say otherwise."""
    defaults = {"max_length": longest_conversation(options, saved), "truncation": DEFAULT_TRUNCATION}
    trained = trained_with(saved, "data")
    given = {name: trained.get(name, default) for name, default in defaults.items()}
    given["max_length"] = int(min(given["max_length"], sizes_of(saved).positions))
    asked = {name: getattr(options, name) for name in (*defaults, "max_dropped_share", "cache_dir")}
    given |= {name: value for name, value in asked.items() if value is not None}
    if given["max_length"] > options.max_tokens_per_micro_batch:
        raise DataError(
            f"conversations of up to {given['max_length']:,} tokens (--max_length) do not fit "
            f"--max_tokens_per_micro_batch {options.max_tokens_per_micro_batch:,}"
        )
    preparation = PreparationOptions(**given)
    sets = {}
    for name, sources in data.items():
        read = partial(prepare_groups, sources, formatter=formatter, options=preparation, role="eval", seed=0)
        try:
            sets[name] = processes.in_turns(f"data {name}", read)
            sizes_of(saved).check({name: sets[name]}, formatter.tokenizer)
        except (DataError, ModelError) as error:  # it names the options of a training
            raise type(error)(in_own_names(error)) from error
        log.print(f"\n[bold]{name}[/bold]")
        log.print(sets[name].report.render(with_examples=False))
    return {name: EvaluatedSet(each, fixed_choice(len(each), options.max_pairs)) for name, each in sets.items()}


def pair_sets(sets: dict[str, EvaluatedSet], judged: dict[str, EvaluatedSet]) -> dict[str, EvaluatedSet]:
    """The sets that are evaluated and the one that the judge is fitted on, by names that no two share."""
    return {f"set {name}": each for name, each in sets.items()} | {
        f"judge {name}": each for name, each in judged.items()
    }


def stored_reference(
    options: EvaluationOptions,
    saved: Saved,
    asked: dict[str, EvaluatedSet],
    processes: Processes,
    log: Console,
) -> dict[str, np.ndarray]:
    """`Evaluation.stored`, of the sets that are asked for. All processes call this together; the first reads the store.

    Raises:
        DataError: the store has none of these weights in the dtype of the model, or the model does not say which they
            are.
    """
    if options.reference_store is None:
        return {}
    start = saved.metadata.get("base", {}).get("namespace")
    if start is None:
        raise DataError(
            f"{saved.folder} does not say what its reference log-probs are stored under, as models of older trainings "
            "do not: leave out --reference_store"
        )
    namespace, root = Namespace(**start), options.reference_store
    if namespace.dtype != saved.config.dtype or not (root / namespace.name).is_dir():
        raise DataError(
            f"--reference_store {root} has no log-probs in {saved.config.dtype} of the weights that {saved.folder} "
            f"started from ({namespace.name})"
        )
    found: dict[str, np.ndarray] = {}
    if processes.is_first:
        store = ReferenceStore(root, namespace, warn=log.warn)
        values = {
            name: store.logprobs(each.groups.keys[places_of(each.groups.lengths.first, each.index)])
            for name, each in asked.items()
        }
        found = {name: each for name, each in values.items() if not np.isnan(each).any()}
        for name in asked.keys() - found.keys():
            missing = int(np.isnan(values[name]).sum())
            log.print(f"{name}: the reference store lacks {missing:,} of {len(values[name]):,} log-probs")
    names = processes.from_first("stored reference", lambda: list(found))
    return found or {name: np.empty(0, dtype=np.float32) for name in names}


def longest_conversation(options: EvaluationOptions, saved: Saved) -> int:
    """Tokens that the model knows and a micro-batch holds."""
    return int(min(options.max_tokens_per_micro_batch, sizes_of(saved).positions))


def sizes_of(saved: Saved) -> ModelSizes:
    return ModelSizes.of(str(saved.folder), load_model_config(saved.config))
