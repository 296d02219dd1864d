"""How long prompts and responses are, of many groups at once, and where what belongs to a group stands in flat arrays.

Legend: G groups, R responses of all of them, those of a group beside one another.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


def starts_of(sizes: np.ndarray) -> np.ndarray:
    """Sizes [G] of parts that lie end to end -> [G + 1] int64: where each begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def places_of(first: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Positions of everything in some of the parts, part after part: [sum of their sizes] int64.

    Args:
        first: [G + 1] as `starts_of` gives it.
        index: the parts, in any order.
    """
    sizes = first[index + 1] - first[index]
    behind = np.cumsum(sizes) - sizes
    return np.repeat(first[index] - behind, sizes) + np.arange(sizes.sum())


@dataclass(frozen=True)
class GroupLengths:
    """Tokens of the prompts and responses of groups.

    prompt: [G] int64. response: [R] int64. first: [G + 1] int64, where the responses of each group begin.
    """

    prompt: np.ndarray
    response: np.ndarray
    first: np.ndarray

    @classmethod
    def of_pairs(cls, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> "GroupLengths":
        """Lengths [P] of pairs."""
        both = np.stack([chosen, rejected], axis=1).astype(np.int64).reshape(-1)
        return cls(np.asarray(prompt, dtype=np.int64), both, np.arange(len(prompt) + 1) * 2)

    @classmethod
    def joined(cls, parts: Iterable["GroupLengths"]) -> "GroupLengths":
        """Those of several sets, one after another."""
        nothing = np.zeros(0, dtype=np.int64)
        every = [cls(nothing, nothing, np.zeros(1, dtype=np.int64)), *parts]
        sizes = np.concatenate([each.num_responses for each in every])
        prompt, response = (np.concatenate([getattr(each, name) for each in every]) for name in ("prompt", "response"))
        return cls(prompt, response, starts_of(sizes))

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def num_responses(self) -> np.ndarray:
        """[G] responses of each group."""
        return np.diff(self.first)

    @property
    def longest_response(self) -> np.ndarray:
        """[G] tokens of the longest response of each group."""
        return self._reduced(np.maximum)

    @property
    def all_responses(self) -> np.ndarray:
        """[G] tokens of all responses of each group."""
        return self._reduced(np.add)

    @property
    def longest_conversation(self) -> np.ndarray:
        """[G] tokens of each prompt with the longest of its responses."""
        return self.prompt + self.longest_response

    def _reduced(self, operation: np.ufunc) -> np.ndarray:
        return operation.reduceat(self.response, self.first[:-1]) if len(self) else np.zeros(0, dtype=np.int64)

    def take(self, index: np.ndarray) -> "GroupLengths":
        """Those of the groups at `index`, in its order."""
        response = self.response[places_of(self.first, index)]
        return GroupLengths(self.prompt[index], response, starts_of(self.first[index + 1] - self.first[index]))

    def costs(self, layout: str) -> np.ndarray:
        """[G] tokens that each group occupies in a layout."""
        if layout == "shared_prefix":
            return self.prompt + self.all_responses
        if layout == "packed":
            return self.num_responses * self.prompt + self.all_responses
        return self.num_responses * self.longest_conversation

    def visible_keys(self, layout: str) -> np.ndarray:
        """[G] keys that the tokens of each group see, summed; padding sees none."""
        copies = self.num_responses
        of_rows = triangle(np.repeat(self.prompt, copies) + self.response)
        visible = np.add.reduceat(of_rows, self.first[:-1]) if len(self) else np.zeros(0)
        return visible - (copies - 1) * triangle(self.prompt) if layout == "shared_prefix" else visible


def triangle(length: np.ndarray) -> np.ndarray:
    """Keys that the tokens of a causal sequence see."""
    return length * (length + 1) / 2
