"""What a comparison trains: Baseline, DPO and HaF in every combination of the values of swept options.

    {option: values} -> Axis for each option -> Arm for each training, but for its seed

An arm has the values of the options that its losses feel, and no others: Baseline is not trained again for another
alpha. A cell is what Baseline feels, so every cell has one Baseline, and a gain is measured against that of its cell.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import ConfigError
from hafrm_ds.options import CommandLine, option_names

Kind = Literal["baseline", "dpo", "haf"]

ALPHA, SHARE, BETA = "objective.alpha", "objective.policy_share", "objective.beta"
OF_JOINT = {ALPHA, SHARE, "objective.policy_share_every", "objective.alternate_every"}
"""Options that only HaF feels."""
OF_POLICY = {BETA, *(f"objective.{name}" for name in ("policy_loss", "policy_label_smoothing", "simpo_gamma"))}
"""Options that Baseline does not feel, beside those."""
OF_REWARD = {
    *(f"objective.{name}" for name in ("rm_weight", "use_margin", "reward_label_smoothing", "reward_centering")),
    *("model.reward_head_init", "model.reward_head_bias", "optimizer.reward_head_learning_rate"),
}
"""Options that DPO does not feel, beside those of HaF."""
OTHER_METHODS: dict[str, tuple[float, ...]] = {SHARE: (0, 1), ALPHA: (0,)}
"""Values of options with which HaF would be Baseline or DPO."""
NOT_FELT: dict[Kind, set[str]] = {"baseline": OF_JOINT | OF_POLICY, "dpo": OF_JOINT | OF_REWARD, "haf": set()}

FIXED = {
    "seed": "--seeds says how many there are",
    "output_dir": "every training has its own folder in that of the comparison",
    "resume": "a comparison always resumes",
    "data.eval": "all methods are tested on the same pairs",
    "evaluation.max_pairs": "all methods are tested on the same pairs",
}
SOURCE_FIELD = "data.train."
"""With the name of a field of a source behind it: that field of every source of data.train."""
PORTION = "data.train.portion"
NAMES = {
    SHARE: "share",
    "model.name_or_path": "model",
    "optimizer.learning_rate": "lr",
    "optimizer.reward_head_learning_rate": "head-lr",
    "optimizer.max_gradient_norm": "clip",
    PORTION: "pairs",
}
"""What options are called in the names of runs; others by the last part of their own."""
LONGEST_NAME = 200
"""Bytes of a method's name: a file's has 255 at most, and the seed and a draft's ending come behind it."""
FIRST_PAIRS = re.compile(r":(\d+)")
"""A portion that is a number of pairs."""


@dataclass(frozen=True)
class Axis:
    """A swept option.

    name: in the names of runs. labels: of the values, there.
    is_shown: a single value stands in the names too.
    """

    option: str
    name: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]
    is_shown: bool

    @property
    def given_by(self) -> str:
        return "--sweep" if self.is_shown else f"--{self.option.rpartition('.')[2]}s"

    @property
    def numbers(self) -> list[float] | None:
        """The values as places on an axis; None where they are no numbers."""
        found = [number for value in self.values if (number := as_number(value)) is not None]
        return found if len(found) == len(self.values) else None

    def to_json(self) -> dict[str, Any]:
        """What comparison.json says of it, under its name."""
        return {"option": self.option, "labels": list(self.labels), "numbers": self.numbers}


@dataclass(frozen=True)
class Arm:
    """One method with the options that it feels.

    cells: in which it stands, several if there are options that Baseline feels and it does not: name of their Baseline
        -> the swept options of the method there, name of the axis -> label of the value.
    """

    name: str
    kind: Kind
    config: TrainConfig
    cells: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def judge(self) -> str:
        objective = self.config.objective
        if objective.uses_reward:
            return "reward"
        return "implicit" if objective.uses_reference else "logprob"

    @property
    def data_key(self) -> str:
        """The options that decide which pairs it sees, but for the seed."""
        model, data = self.config.model, self.config.data
        return json.dumps([model.name_or_path, model.revision, data.model_dump(mode="json", exclude={"eval"})])


def axes_of(
    config: TrainConfig, alphas: Sequence[float], betas: Sequence[float], sweep: Mapping[str, Sequence[Any]]
) -> list[Axis]:
    """The swept options.

    Args:
        alphas, betas: of objective.alpha and objective.beta; one alone is not shown in the names of runs.
        sweep: dotted option, or data.train.FIELD -> its values.

    Raises:
        ConfigError: an option cannot be swept, or a value is none, or there twice.
    """
    given = {option: list(values) for option, values in ((ALPHA, alphas), (BETA, betas)) if values}
    problems = [*positive("alphas", alphas), *positive("betas", betas)]
    problems += [
        f"--sweep and --{option.rpartition('.')[2]}s both give values of {option}; leave one of the two out"
        for option in sweep
        if option in given
    ]
    shown: dict[str, list[Any]] = {}
    for option, values in sweep.items():
        shown[option], faults = typed_values(config, option, values)
        problems += faults
    if problems:
        raise ConfigError(problems)
    typed = {option: typed_values(config, option, values)[0] for option, values in given.items()} | shown
    if ALPHA in typed and SHARE in typed:
        raise ConfigError([f"{ALPHA} and {SHARE} cannot both be swept: the share finds its own alpha"])
    names = axis_names(typed)
    axes = [
        Axis(option, names[option], tuple(values), tuple(labels_of(values)), option in shown)
        for option, values in typed.items()
    ]
    problems = [
        "--sweep cannot have epochs beside max_steps, which counts in their place: leave one of the two out"
        for option in typed
        if option == "epochs" and (config.max_steps is not None or "max_steps" in typed)
    ]
    problems += [
        f"{axis.given_by} has {times} values{of_option} that are written {label} in the names of the runs; give each "
        "only once"
        for axis in axes
        for of_option in [f" of {axis.option}" if axis.is_shown else ""]
        for label, times in Counter(axis.labels).items()
        if times > 1
    ]
    if problems:
        raise ConfigError(problems)
    return axes


def arms_of(config: TrainConfig, axes: Sequence[Axis]) -> list[Arm]:
    """Baseline (alpha 0), DPO (rm_weight 0) and HaF of every combination of the values that they feel, cell by cell. A
    swept policy share says itself which there are: 0 is Baseline, which is always there, 1 is DPO. A swept alpha of
    0 is Baseline.

    Raises:
        ConfigError: the configuration does not have both losses, names no evaluation set, or an arm contradicts itself
            or has too long a name.
    """
    objective = config.objective
    problems = []
    if not (objective.uses_reward and objective.uses_policy):
        problems.append(
            f"a comparison turns the losses off one by one: objective.alpha (now {objective.alpha}) and "
            f"objective.rm_weight (now {objective.rm_weight}) must be above 0"
        )
    if not config.data.eval:
        problems.append("a comparison needs data.eval: first the set of the training distribution, then any others")
    if problems:
        raise ConfigError(problems)

    shares = next((axis.values for axis in axes if axis.option == SHARE), None)
    kinds: list[Kind] = ["baseline"]
    kinds += ["dpo"] if shares is None or 1 in shares else []
    kinds += ["haf"] if shares is None or set(shares) - {0, 1} else []
    arms: dict[str, Arm] = {}
    of_cell = felt_by("baseline", axes)
    for cell in choices(of_cell):
        baseline = name_of("baseline", cell)
        for kind in kinds:
            rest = [axis for axis in felt_by(kind, axes) if axis not in of_cell]
            felt = [(axis, place) for axis, place in cell if axis in felt_by(kind, axes)]
            for choice in choices(rest):
                if any(axis.values[place] in OTHER_METHODS.get(axis.option, ()) for axis, place in choice):
                    continue
                # What was there before sweeps stands in its old order: alpha, then beta.
                chosen = sorted([*felt, *choice], key=lambda each: axes.index(each[0]))
                name = name_of(kind, chosen)
                if name not in arms:
                    values = {axis.option: axis.values[place] for axis, place in chosen}
                    options, found = with_values(config, values, kind)
                    found = found if options is None else options.contradictions()
                    problems += [f"{name}: {problem}" for problem in found]
                    arms[name] = Arm(name, kind, options or config)
                in_cell = {axis.name: axis.labels[place] for axis, place in [*cell, *choice]}
                arms[name].cells[baseline] = in_cell
    longest = max(arms, key=lambda name: len(name.encode()))
    if len(longest.encode()) > LONGEST_NAME:
        problems.append(
            f"the folder of a run is named by its values, and {longest} is too long for a name; give shorter ones in "
            "--sweep, as by a relative path"
        )
    if problems:
        raise ConfigError(problems)
    return list(arms.values())


Choice = list[tuple[Axis, int]]
"""Axes with the place of one of their values."""


def felt_by(kind: Kind, axes: Iterable[Axis]) -> list[Axis]:
    return [axis for axis in axes if axis.option not in NOT_FELT[kind]]


def choices(axes: Sequence[Axis]) -> Iterator[Choice]:
    """Every combination of values."""
    for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
        yield list(zip(axes, places, strict=True))


def name_of(kind: Kind, choice: Choice) -> str:
    """haf-alpha0.2-beta0.1"""
    shown = [(axis, place) for axis, place in choice if axis.is_shown or len(axis.values) > 1]
    return "".join([kind, *(f"-{axis.name}{axis.labels[place]}" for axis, place in shown)])


def with_values(config: TrainConfig, values: Mapping[str, Any], kind: Kind) -> tuple[TrainConfig | None, list[str]]:
    """The configuration with other values of options, for a method; and what is wrong with them."""
    tree = config.run.model_dump(mode="json")
    objective = tree["objective"]
    no_share = {"policy_share": None, "policy_share_every": None}
    # One loss alone has no share; and alphas that are given take the place of one.
    if kind == "baseline":
        objective |= no_share | {"alpha": 0.0}
    elif kind == "dpo":
        # A weight beside nothing would only decide what max_gradient_norm cuts.
        objective |= no_share | {"alpha": 1.0, "rm_weight": 0.0}
    elif ALPHA in values:
        objective |= no_share
    elif SHARE in values:
        objective["alpha"] = None
    if kind != "haf":
        tree["logging"]["gradient_shares_every"] = 0  # one loss alone pulls by itself
    for option, value in values.items():
        put(tree, option, value)
    return CommandLine(TrainConfig, (), {}).validate(tree)


def put(tree: dict[str, Any], option: str, value: Any) -> None:
    """Set an option, or a field of all training sources, in place."""
    if option.startswith(SOURCE_FIELD):
        for source in tree["data"]["train"]:
            source[option.removeprefix(SOURCE_FIELD)] = value
        return
    *sections, key = option.split(".")
    for section in sections:
        tree = tree[section]
    tree[key] = value


def value_in(tree: Mapping[str, Any], option: str) -> Any:
    """What `put` has set."""
    if option.startswith(SOURCE_FIELD):
        return tree["data"]["train"][0].get(option.removeprefix(SOURCE_FIELD))
    node: Any = tree
    for key in option.split("."):
        node = node[key]
    return node


# ---- values and their names ------------------------------------------------------------------------------------------


def positive(option: str, values: Sequence[float]) -> Iterator[str]:
    """What is wrong with the values of an option, in words."""
    yield from (
        f"--{option} has a value of {value}; each must be a number above 0"
        for value in values
        if not 0 < value < math.inf
    )


def typed_values(config: TrainConfig, option: str, values: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The values of an option as the configuration holds them (YAML takes 5e-5 for a text); and what is wrong with
    these, or with the option in --sweep, in words."""
    known = {*option_names(TrainConfig), *(SOURCE_FIELD + name for name in Source.model_fields)}
    if option in FIXED:
        return [], [f"--sweep cannot have {option}: {FIXED[option]}"]
    if option not in known:
        if inside := sorted(name for name in known if name.startswith(f"{option}.")):
            return [], [f"--sweep has {option}, which is a section: write its options with dots, as {inside[0]}"]
        near = CommandLine(TrainConfig, (), {}).nearest(option)
        return [], [f"--sweep has the unknown option {option}; {near}"]
    if not values:
        return [], [f"--sweep has no value of {option}"]
    if option == SHARE:
        wrong = [
            value
            for value in values
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1
        ]
        problems = [
            f"--sweep has a value of {SHARE} of {value!r}; each must be a number from 0 to 1" for value in wrong
        ]
        return [] if wrong else list(map(float, values)), problems
    found = [with_values(config, {option: value}, "haf") for value in values]
    typed = [value_in(options.model_dump(mode="json"), option) for options, _ in found if options is not None]
    return typed, [f"--sweep: {problem}" for _, problems in found for problem in problems]


def as_number(value: Any) -> float | None:
    """A value as a place on an axis: a number, or the pairs of a portion `:N`."""
    if isinstance(value, str) and (pairs := FIRST_PAIRS.fullmatch(value)):
        return float(pairs[1])
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def axis_names(options: Iterable[str]) -> dict[str, str]:
    """What options are called in the names of runs: shortly, or by their whole names where that says too little."""
    short = {option: NAMES.get(option, option.rpartition(".")[2].replace("_", "-")) for option in options}
    times = Counter(short.values())
    return {option: name if times[name] == 1 else in_a_name(option) for option, name in short.items()}


def labels_of(values: Sequence[Any]) -> list[str]:
    """Values as they stand in the names of runs: of paths the last parts that tell them apart."""
    if all(isinstance(value, str) and as_number(value) is None for value in values):
        parts = [[part for part in value.split("/") if part] or [value] for value in values]
        depths = [1] * len(parts)
        while True:
            labels = [in_a_name("-".join(each[-depth:])) for each, depth in zip(parts, depths, strict=True)]
            times = Counter(labels)
            # Those alone that another has too, so that a value that is added renames no others.
            deeper = [k for k, label in enumerate(labels) if times[label] > 1 and depths[k] < len(parts[k])]
            if not deeper:
                return labels
            for k in deeper:
                depths[k] += 1
    return [in_a_name(value) for value in values]


def in_a_name(value: Any) -> str:
    number = as_number(value)
    if number is not None:
        return f"{number:g}"
    if isinstance(value, list):
        return "+".join(map(in_a_name, value))
    if isinstance(value, dict):
        return "-".join(map(in_a_name, value.values()))
    text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    return re.sub(r"[^\w.+%-]+", "-", text).strip("-")
