"""Log-probs of the reference policy: the weights a run starts from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.data.planning import DUMMY
from hafrm_ds.data.tokenization import TokenizedPair
from hafrm_ds.errors import DataError
from hafrm_ds.training.engine import Engine
from hafrm_ds.training.scoring import score_pairs


@dataclass(frozen=True)
class ReferenceLogprobs:
    """log pi_ref of a set of pairs.

    values: [pairs, 2] fp32, (chosen, rejected), NaN where none was computed.
    """

    values: np.ndarray

    def of(self, index: np.ndarray) -> Tensor:
        """[P] positions -> [2P] fp32, ordered chosen, rejected, chosen, ...

        A missing value is an error, never 0; only dummies, which count nothing, get 0.
        """
        found = np.where((index == DUMMY)[:, None], np.float32(0), self.values[index])
        if np.isnan(found).any():
            missing = index[np.isnan(found).any(axis=1)]
            raise RuntimeError(f"no reference log-prob for pairs {missing[:10].tolist()}")
        return torch.from_numpy(found.reshape(-1))


def compute_reference(
    engine: Engine,
    pairs: Sequence[TokenizedPair],
    index: np.ndarray,
    costs: np.ndarray,
    *,
    layout: str,
    max_tokens: int,
    on_progress: Callable[[int], None],
) -> ReferenceLogprobs:
    """Score the pairs at `index` with the engine before its first step, when the policy is the reference.

    Raises:
        DataError: a log-prob is not finite.
    """
    logprobs = score_pairs(
        engine,
        pairs,
        index,
        costs,
        layout=layout,
        max_tokens=max_tokens,
        with_reward=False,
        with_logprob=True,
        on_progress=on_progress,
    )["logprob"]
    broken = index[~np.isfinite(logprobs).all(axis=1)]
    if len(broken):
        named = ", ".join(pairs[int(position)].id for position in broken[:10])
        raise DataError(f"{len(broken)} pairs have a reference log-prob that is not finite: {named}")
    values = np.full((len(pairs), 2), np.nan, dtype=np.float32)
    values[index] = logprobs
    return ReferenceLogprobs(values)
