"""The options of an evaluation (launch/evaluate.py)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hafrm_ds.config import Positive, PositiveInt, ScoringSection, Share
from hafrm_ds.data.sources import EvalSources, suggestion
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hafrm_ds.evaluation.report.reading import METRICS_FILE
from hafrm_ds.saved.opening import BASE


def benchmarks_of(words: Any) -> Any:
    """NAME or NAME=PATH, one or a list of them -> where each benchmark lies; None: on the hub."""
    if isinstance(words, dict):
        return words
    found: dict[str, str | None] = {}
    for word in words if isinstance(words, list) else [words]:
        name, _, path = str(word).partition("=")
        if name in found:
            raise ValueError(f"names {name} twice; evaluate the second into another --output_dir")
        found[name] = path or None
    return found


def known_benchmarks(found: dict[str, str | None]) -> dict[str, str | None]:
    for name in found:
        if name not in BENCHMARKS:
            raise ValueError(f"{name} is not known{suggestion(name, BENCHMARKS)} (known: {', '.join(BENCHMARKS)})")
    return found


def folder_of_no_run(folder: Path) -> Path:
    """Raises ValueError for the folder of a run: its own held-out scores and its report would be replaced."""
    if (folder / METRICS_FILE).exists():
        raise ValueError(f"{folder} holds a run, with scores and a report of its own: give another, as {folder}/more")
    return folder


class EvaluationOptions(ScoringSection):
    """The options of launch/evaluate.py."""

    model: str
    """Folder or hub id, a function FILE.py:NAME, or FILE.yaml, which composes rewards."""
    output_dir: Annotated[Path, AfterValidator(folder_of_no_run)]
    """Where the results go."""
    data: EvalSources = Field(default={})
    """One or more sources, each of which is a set, or '{NAME: SOURCE, ...}' to name the sets."""
    benchmarks: Annotated[dict[str, str | None], BeforeValidator(benchmarks_of), AfterValidator(known_benchmarks)] = (
        Field({}, description=f"Of {', '.join(BENCHMARKS)}: NAME takes it from the hub, NAME=PATH from there.")
    )
    reference: str | None = None
    """Policy that the implicit reward is measured against: a folder, a hub id, or base: what the training started from.
    """
    reference_store: Path | None = None
    """The store of the training's reference log-probs (its reference.store). Sets of which it has every pair need no
    forward of the reference, and no weights of it."""
    fit_judge: EvalSources = Field(default={})
    """Pairs to fit the combined judge on: what either head of the model counts. Those that --data has too are judged
    fold by fold. Default: the fit that is saved with the model. The default of --reference is then base."""
    save_judge: bool = False
    """Put the fit of --fit_judge into hafrm.json of the model, for whatever scores with it later."""
    beta: Positive | None = None
    """Scale of the implicit reward. Default: that of the training, else 0.1."""
    max_pairs: PositiveInt | None = None
    """Use at most this many pairs of each set: a fixed random choice."""
    max_length: PositiveInt | None = None
    """Longest conversation in tokens. Default: that of the training, else what the model knows and a micro-batch holds.
    """
    truncation: Literal["drop", "keep_prompt_end", "cut_response"] | None = None
    """What happens to longer ones. Default: as in the training, else keep_prompt_end."""
    max_dropped_share: Share | None = None
    """Stop when a larger share of the pairs would be dropped. Default: 0.05."""
    cache_dir: Path | None = None
    """Where prepared data is kept between runs. Default: the cache folder of Hugging Face datasets."""
    misfits: Literal["leave_out", "cut"] = "leave_out"
    """Questions of a benchmark with an answer that leaves no room for its prompt. leave_out: they are not asked, and
    counted. cut: their answers lose their end. Questions that the chat template cannot render are left out."""
    max_missing_share: Share = 0.05
    """A benchmark has no overall score when a larger share of its questions is left out."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON: shard the model over the processes."""

    def contradictions(self) -> list[str]:
        problems = []
        if not (self.data or self.benchmarks or self.fit_judge):
            problems.append("neither --data nor --benchmarks was given: there is nothing to evaluate on")
        if len(self.fit_judge) > 1:
            problems.append("--fit_judge takes one set; several sources of one are '{NAME: [SOURCE, SOURCE]}'")
        if self.reference_store is not None and self.reference not in (None, BASE):
            problems.append("--reference_store is of what the training started from: give --reference base, or neither")
        if self.save_judge and not self.fit_judge:
            problems.append("--save_judge true saves the fit of --fit_judge, which is not given")
        if self.save_judge and not Path(self.model).is_dir():
            problems.append(f"--save_judge true writes into the folder of the model, and {self.model} is none")
        return problems
