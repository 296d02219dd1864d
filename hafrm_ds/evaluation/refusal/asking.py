"""What the arms are asked: the prompts under each defence, as token ids of each probe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hafrm_ds.data.pairs import Message
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.refusal.probes import OPENINGS, REWARD, Openings, groups_for
from hafrm_ds.evaluation.refusal.prompts import GivenAnswers, LabelledPrompt, with_last
from hafrm_ds.evaluation.refusal.subjects import Arm, Subject
from hafrm_ds.generation.samplers import Answer
from hafrm_ds.saved.scorer import check_fits


@dataclass(frozen=True)
class Asked:
    """One prompt as an arm is asked it.

    answers: for the reward head; None where there are none.
    """

    labelled: LabelledPrompt
    prompt: list[Message]
    answers: GivenAnswers | None

    def num_refusals(self, probe: str, openings: Openings) -> int:
        """How many of the responses that a probe compares refuse."""
        if probe == REWARD:
            return len(self.answers.refusals) if self.answers else 0
        return len(openings.refusals) if probe == OPENINGS else 1


def asked_of(
    arm: Arm,
    prompts: Sequence[LabelledPrompt],
    system: str,
    rewrites: Sequence[Answer],
    answers: Mapping[str, GivenAnswers],
) -> list[Asked]:
    """The prompts of an arm, in order.

    Args:
        system: text of the system message.
        rewrites: by the model, one for each prompt, which is asked as it is where the model has written nothing; of an
            arm without them nothing.
        answers: by the key of their prompt.
    """
    asked = []
    for place, each in enumerate(prompts):
        text = rewrites[place].text if arm.rewrite else ""
        prompt = with_last(each.prompt, text) if text else each.prompt
        asked.append(Asked(each, with_system(prompt, system) if arm.system else prompt, answers.get(each.key)))
    return asked


def with_system(prompt: list[Message], system: str) -> list[Message]:
    """The prompt behind a system message; one of its own is continued in the same message."""
    first, *rest = prompt
    if first["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    return [{**first, "content": f"{system}\n\n{first['content']}"}, *rest]


def answerable(probe: str, asked: Sequence[Asked]) -> list[Asked]:
    """Those that a probe can be asked: the reward head only where there are answers."""
    return [each for each in asked if probe != REWARD or each.answers is not None]


def groups_of_arm(
    subject: Subject, probe: str, arm: Arm, asked: Sequence[Asked], openings: Openings, max_tokens: int
) -> list[list[PromptWithResponses]]:
    """Token ids of what a probe asks, for each of the `answerable` prompts.

    Raises:
        DataError: naming the row of a prompt that cannot be asked.
    """
    found = []
    for each in answerable(probe, asked):
        try:
            groups = groups_for(probe, subject.formatter, each.prompt, openings, each.answers)
            for group in groups:
                check_fits(subject.sizes, subject.formatter, group, max_tokens)
        except DataError as error:
            remedy = ""
            if arm.system:
                remedy = "; where the template takes no system message, leave --system out, or give a --chat_template"
            raise DataError(
                f"{each.labelled.id}: {subject.name} cannot be asked ({arm.name}): {error}{remedy}"
            ) from error
        found.append(groups)
    return found
