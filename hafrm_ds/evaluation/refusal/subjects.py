"""The models that are measured, and the arms that they are measured in."""

from dataclasses import dataclass
from pathlib import Path

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.errors import DataError, ModelError, in_own_names
from hafrm_ds.evaluation.refusal.options import GENERATED, RefusalOptions
from hafrm_ds.evaluation.refusal.probes import HEAD_OF, REWARD
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.saved.opening import Saved, open_model


@dataclass(frozen=True)
class Arm:
    """A model, with or without the defences in front of it.

    system: a system message is put in front. rewrite: the model has rewritten the prompt.
    """

    model: str
    system: bool = False
    rewrite: bool = False

    @property
    def name(self) -> str:
        return " + ".join([self.model, *["system message"] * self.system, *["rewriting"] * self.rewrite])

    def parts(self, first: str) -> list[str]:
        """Names of the arms that have one of its defences alone; another model than the first is one of them."""
        alone = [Arm(self.model)] * (self.model != first)
        alone += [Arm(first, system=True)] * self.system + [Arm(first, rewrite=True)] * self.rewrite
        return [arm.name for arm in alone]


def arms_of(model: str, *, system: bool, rewrite: bool) -> list[Arm]:
    """A model alone, and with each combination of the defences that were asked for."""
    choices = [(False, True)[: 1 + asked] for asked in (system, rewrite)]
    return [Arm(model, with_system, with_rewrite) for with_system in choices[0] for with_rewrite in choices[1]]


@dataclass(frozen=True)
class Subject:
    """A model that is measured, opened without its weights. Build it with `open`.

    number: of the model, from 1. probes: those that its heads can answer.
    """

    name: str
    number: int
    saved: Saved
    formatter: ChatFormatter
    sizes: ModelSizes
    probes: tuple[str, ...]

    @classmethod
    def open(cls, name: str, number: int, options: RefusalOptions) -> "Subject":
        """Raises ModelError if none of its heads can be asked, or it is to write and cannot."""
        saved = open_model(options.models[name], **options.loading)
        try:
            formatter = saved.formatter()
        except ModelError as error:
            raise ModelError(in_own_names(error)) from error
        heads = saved.heads if options.answers is not None else tuple(set(saved.heads) - {HEAD_OF[REWARD]})
        probes = tuple(probe for probe, head in HEAD_OF.items() if head in heads)
        if not probes:
            raise ModelError(f"{name} has a reward head alone, which compares answers: give --answers FILE")
        writes = ["--rewrite true"] * options.rewrite
        writes += ["--answers generated, which the first model writes,"] * (
            options.answers == GENERATED and number == 1
        )
        if writes and "logprob" not in saved.heads:
            raise ModelError(f"{name} has no LM head, so it writes nothing, and {writes[0]} asks it to")
        sizes = ModelSizes.of(str(saved.folder), load_model_config(saved.config))
        return cls(name, number, saved, formatter, sizes, probes)


def read_system(file: Path) -> str:
    """The system message in a file. Raises DataError if it cannot be read, or holds nothing."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--system {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text:
        raise DataError(f"--system {file} is empty")
    return text
