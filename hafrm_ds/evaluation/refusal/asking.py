"""What the arms are asked: the prompts under each defence, as token ids of each probe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hafrm_ds.data.pairs import Message
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.refusal.probes import OPENINGS, REWARD, Openings, groups_for
from hafrm_ds.evaluation.refusal.prompts import GivenAnswers, LabelledPrompt
from hafrm_ds.evaluation.refusal.subjects import Arm, Subject
from hafrm_ds.evaluation.refusal.writing import rewritten
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
        rewrites: by the model, one for each prompt; of an arm without them nothing.
        answers: by the key of their prompt.
    """
    front = [{"role": "system", "content": system}] if arm.system else []
    return [
        Asked(each, [*front, *(rewritten(each.prompt, rewrites[place].text) if arm.rewrite else each.prompt)],
              answers.get(each.key))
        for place, each in enumerate(prompts)
    ]  # fmt: skip


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
