"""Rewards by what they are called: a model, a function FILE.py:NAME, or a YAML file with one of another kind or of
several.

    hierarchy: hierarchical
    threshold: 0.6
    holistic: {model: runs/helpful/final, mean: -1.2, deviation: 2.5, weight: 5}
    aspects:
      harmless: {model: runs/harmless/final, mean: 0.3, deviation: 1.9}
      brevity: aspects.py:brevity

Wherever a reward stands, a text will do: FILE.yaml, FILE.py:NAME, or the folder or hub id of a model.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError

from hafrm_ds.config import NonNegative, Positive
from hafrm_ds.errors import ConfigError, ModelError
from hafrm_ds.options import Section, from_yaml
from hafrm_ds.rewards.ensemble import By, OpenedEnsemble
from hafrm_ds.rewards.field_match import FieldMatch
from hafrm_ds.rewards.function import OpenedFunction
from hafrm_ds.rewards.hierarchy import Mode, OpenedHierarchy, Rule
from hafrm_ds.rewards.model import OpenedModel
from hafrm_ds.rewards.reward import OpenedNormalised, OpenedReward
from hafrm_ds.rewards.rubric import OpenedRubric, RubricOptions
from hafrm_ds.saved.opening import Judge, open_model, open_reward_model

TAG = "kind: "
"""How the tags of the union begin, which pydantic puts among the keys that lead to a fault."""
KINDS = ("model", "function", "file", "ensemble", "hierarchy", "rubric", "fields")
"""Of the keys of a reward, the one that says what it is."""


def as_mapping(value: Any) -> Any:
    """A reward that is written as a text, as the mapping that it stands for."""
    if not isinstance(value, str):
        return value
    if value.endswith((".yaml", ".yml")):
        return {"file": value}
    return {"function": value} if ".py:" in value else {"model": value}


def kind_of(value: Any) -> str | None:
    """The tag of a reward; None unless exactly one of KINDS is among its keys."""
    if isinstance(value, Part):
        return TAG + next(kind for kind in KINDS if kind in type(value).model_fields)
    found = [kind for kind in KINDS if kind in value] if isinstance(value, dict) else []
    return TAG + found[0] if len(found) == 1 else None


class Part(Section):
    """A reward in a composition: what every kind has."""

    mean: float | None = None
    """With `deviation`: give the reward as (value - mean) / deviation. launch/agreement.py fits both."""
    deviation: Positive | None = None
    """See `mean`."""
    weight: float | None = None
    """In a hierarchy, what the reward counts. Default: 1."""

    def contradictions(self) -> list[str]:
        return [] if (self.mean is None) == (self.deviation is None) else ["give mean and deviation, or neither"]

    def parts(self) -> Iterator[tuple[str, "Part"]]:
        """Where the rewards in this one stand, and these."""
        return iter(())


class ModelPart(Part):
    """A model that is saved on disk or lies on the hub."""

    model: str
    """The final/ folder of a training, another reward model or a causal LM: a folder beside the YAML file or from where
    the command runs, or a hub id."""
    judge: Literal["reward", "implicit", "combined", "logprob"] | None = None
    """What scores: reward (the reward head), implicit (the policy against its reference), combined (both as one) or
    logprob (the summed log-prob of the policy). Default: the reward head, and without one the implicit reward."""
    reference: str | None = None
    """Of the implicit reward and the combined judge, what the policy is measured against. Default: base."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the weights. Default: that of the command, else that of the saved weights."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""

    def contradictions(self) -> list[str]:
        reads_logprob = self.judge == "logprob" and self.reference is not None
        return super().contradictions() + ["judge logprob takes no reference"] * reads_logprob


class FunctionPart(Part):
    """A Python function of the user."""

    function: Annotated[str, Field(pattern=r"\.py:[^\W\d]\w*$")]
    """FILE.py:NAME, the file as seen from the YAML file."""
    batched: bool = False
    """It is called once for many conversations, with a list for each argument, and returns a list of their values."""
    timeout: Positive = 60.0
    """Seconds that one call may take."""


class FilePart(Part):
    """Another composition."""

    file: Path
    """A YAML file, as seen from this one."""


class EnsemblePart(Part):
    """Several rewards as one."""

    ensemble: Annotated[list["AnyPart"], Field(min_length=2)]
    """Its members."""
    by: By = "mean"
    """mean, min, or mean_minus_deviations: the mean less k deviations of the members."""
    k: NonNegative | None = None
    """Of mean_minus_deviations: how many."""

    def contradictions(self) -> list[str]:
        needs_k = self.by == "mean_minus_deviations"
        problem = "by mean_minus_deviations needs k" if needs_k else f"k has no meaning by {self.by}"
        return super().contradictions() + ([] if (self.k is not None) == needs_k else [problem])

    def parts(self) -> Iterator[tuple[str, Part]]:
        return ((f"ensemble.{number}", part) for number, part in enumerate(self.ensemble))


class HierarchyPart(Part):
    """ALaRM's hierarchy: a holistic reward, and aspects that count above its threshold (`rewards.hierarchy`)."""

    hierarchy: Mode
    """The mode."""
    threshold: float | None = None
    """Of the mode hierarchical: the aspects count where the normalised holistic reward is at least this."""
    holistic: "AnyPart"
    """The reward of the answer as a whole, with its mean and deviation. weight: what it counts beside the aspects."""
    aspects: Annotated[dict[str, "AnyPart"], Field(min_length=1)]
    """Name -> reward. Each is shaped by a sigmoid and counts by its weight."""

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        if self.hierarchy == "hierarchical" and self.threshold is None:
            problems.append("the mode hierarchical needs a threshold")
        if self.hierarchy != "aspects_only" and self.holistic.mean is None:
            problems.append(
                f"the mode {self.hierarchy} needs mean and deviation of the holistic reward, without which a threshold "
                "and a weight mean nothing (launch/agreement.py fits them)"
            )
        return problems

    def parts(self) -> Iterator[tuple[str, Part]]:
        yield "holistic", self.holistic
        yield from ((f"aspects.{name}", part) for name, part in self.aspects.items())


class RubricPart(Part, RubricOptions):
    """A judge behind a chat endpoint, which grades or compares answers by criteria (`rewards.rubric`)."""

    def contradictions(self) -> list[str]:
        return super().contradictions() + self.faults()


class FieldsPart(Part):
    """The share of fields that an answer has exactly as they are known (`rewards.field_match`)."""

    fields: Path
    """JSON lines with the `prompt` and the `fields` of an answer to it, as seen from the YAML file."""


AnyPart = Annotated[
    Annotated[ModelPart, Tag(f"{TAG}model")]
    | Annotated[FunctionPart, Tag(f"{TAG}function")]
    | Annotated[FilePart, Tag(f"{TAG}file")]
    | Annotated[EnsemblePart, Tag(f"{TAG}ensemble")]
    | Annotated[HierarchyPart, Tag(f"{TAG}hierarchy")]
    | Annotated[RubricPart, Tag(f"{TAG}rubric")]
    | Annotated[FieldsPart, Tag(f"{TAG}fields")],
    Discriminator(
        kind_of,
        custom_error_type="reward",
        custom_error_message=f"a reward is a text or a mapping with exactly one of the keys {', '.join(KINDS)}",
    ),
    BeforeValidator(as_mapping),
]
SCHEMAS: dict[str, type[Part]] = {
    "model": ModelPart,
    "function": FunctionPart,
    "file": FilePart,
    "ensemble": EnsemblePart,
    "hierarchy": HierarchyPart,
    "rubric": RubricPart,
    "fields": FieldsPart,
}
for schema in (EnsemblePart, HierarchyPart):
    schema.model_rebuild()
ANY_PART: TypeAdapter[Part] = TypeAdapter(AnyPart)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_composition(file: Path) -> Part:
    """What a YAML file says, without looking at what it names.

    Raises:
        ConfigError: with all faults: it cannot be read, an unknown key, a wrong value, a contradiction.
    """
    try:
        content = from_yaml(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{file}: is not valid YAML: {' '.join(str(error).split())}"]) from error
    try:
        part = ANY_PART.validate_python(content)
    except ValidationError as error:
        raise ConfigError([f"{file}: {in_words(fault)}" for fault in error.errors()]) from error
    problems = list(problems_of(part, ""))
    if part.weight is not None:
        problems.append("weight: a weight counts in a hierarchy alone")
    if problems:
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    return part


def problems_of(part: Part, where: str) -> Iterator[str]:
    """Contradictions in a reward and in those that it is made of, each with where it stands."""
    yield from (f"{where}: {problem}".removeprefix(": ") for problem in part.contradictions())
    for name, inner in part.parts():
        place = f"{where}.{name}".removeprefix(".")
        if inner.weight is not None and not isinstance(part, HierarchyPart):
            yield f"{place}.weight: a weight counts in a hierarchy alone"
        yield from problems_of(inner, place)


def in_words(fault: Any) -> str:
    """A fault of pydantic: where it stands, what is wrong, and the nearest key that there is."""
    keys = [str(key) for key in fault["loc"]]
    place = ".".join(key for key in keys if not key.startswith(TAG))
    if fault["type"] == "extra_forbidden" and not keys[-2].startswith(TAG):  # in a mapping that is no reward
        return f"{place}: unknown key"
    if fault["type"] == "extra_forbidden":
        kind = next(key.removeprefix(TAG) for key in reversed(keys) if key.startswith(TAG))
        known = list(SCHEMAS[kind].model_fields)
        near = difflib.get_close_matches(keys[-1], known, n=1)
        return f"{place}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    if fault["type"] == "missing":
        return f"{place}: is required and was not given"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {message[0].lower() + message[1:]} (given: {fault['input']!r:.80})".removeprefix(": ")


# ---- opening -------------------------------------------------------------------------------------------------------


def is_model(name: str | Path) -> bool:
    """Whether a reward of this name is a model, and neither a function nor a composition."""
    return "model" in as_mapping(str(name))


def open_reward(
    name: str | Path, *, judge: Judge | None = None, reference: str | None = None, **loading: Any
) -> OpenedReward:
    """Look at a reward without loading weights or running a function.

    Args:
        name: FILE.yaml of a composition, FILE.py:NAME of a function, or a model as `open_reward_model` takes it.
        judge, reference: of a model, as `open_reward_model` takes them.
        loading: as `open_model` takes it, for all models.

    Raises:
        ConfigError: a composition that contradicts itself or names itself, or a judge for what is no model.
        ModelError: a model or a function that cannot be used.
    """
    if is_model(name):
        return OpenedModel(open_reward_model(name, judge=judge, reference=reference, **loading))
    if judge is not None or reference is not None:
        raise ConfigError(
            [
                f"--judge and --reference are of models alone, and {name} is none; a composition names those of each "
                "model"
            ]
        )
    part = ANY_PART.validate_python(str(name)) if ".py:" not in str(name) else function_named(str(name))
    return open_part(part, Path(), loading, ())


def function_named(name: str) -> FunctionPart:
    """A function on the command line. Raises ConfigError unless it is written FILE.py:NAME."""
    try:
        return FunctionPart(function=name)
    except ValidationError as error:
        raise ConfigError([f"{name}: a function is written FILE.py:NAME"]) from error


def open_part(part: Part, folder: Path, loading: dict[str, Any], within: tuple[Path, ...]) -> OpenedReward:
    """A reward of a composition, normalised if it asks for that.

    Args:
        folder: what the files in it are seen from. within: the compositions that this one stands in, outermost first.
    """
    opened = open_plain(part, folder, loading, within)
    if part.mean is None or part.deviation is None:
        return opened
    return OpenedNormalised(opened, part.mean, part.deviation)


def open_plain(part: Part, folder: Path, loading: dict[str, Any], within: tuple[Path, ...]) -> OpenedReward:
    def opened(inner: Part) -> OpenedReward:
        return open_part(inner, folder, loading, within)

    if isinstance(part, FilePart):
        file = (folder / part.file).resolve()
        if file in within:
            circle = " -> ".join(each.name for each in (*within[within.index(file) :], file))
            raise ConfigError([f"{file} names itself: {circle}"])
        return open_part(read_composition(file), file.parent, loading, (*within, file))
    if isinstance(part, FunctionPart):
        path, _, name = part.function.rpartition(":")
        return OpenedFunction.open(folder / path, name, is_batched=part.batched, timeout=part.timeout)
    if isinstance(part, EnsemblePart):
        return OpenedEnsemble(
            {f"ensemble.{number}": opened(inner) for number, inner in enumerate(part.ensemble)}, part.by, part.k or 0.0
        )
    if isinstance(part, HierarchyPart):
        rule = Rule(part.hierarchy, part.threshold, weight_of(part.holistic))
        aspects = {name: (weight_of(inner), opened(inner)) for name, inner in part.aspects.items()}
        return OpenedHierarchy(rule, opened(part.holistic), aspects)
    if isinstance(part, RubricPart):
        return OpenedRubric(part)
    if isinstance(part, FieldsPart):
        return FieldMatch.open(folder / part.fields)
    assert isinstance(part, ModelPart)
    own = {name: value for name in ("dtype", "chat_template") if (value := getattr(part, name)) is not None}
    return open_model_part(part, folder, loading | own)


def open_model_part(part: ModelPart, folder: Path, loading: dict[str, Any]) -> OpenedModel:
    name, reference = (beside(each, folder) for each in (part.model, part.reference))
    assert name is not None
    if part.judge != "logprob":
        return OpenedModel(open_reward_model(name, judge=part.judge, reference=reference, **loading))
    saved = open_model(name, **loading)
    if "logprob" not in saved.heads:
        raise ModelError(f"{name} has no LM head, so no log-probs (judge logprob)")
    return OpenedModel(saved, "logprob")


def beside(name: str | None, folder: Path) -> str | None:
    """A model's folder as seen from a composition, where there is one; else its name as it is."""
    return str(folder / name) if name is not None and (folder / name).is_dir() else name


def weight_of(part: Part) -> float:
    return 1.0 if part.weight is None else part.weight
