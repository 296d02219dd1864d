"""What a server says of its judges (GET /model): those that it has, and how it is started so that it has the others."""

from typing import Any

from hafrm_ds.errors import ModelError
from hafrm_ds.rewards.model import OpenedModel
from hafrm_ds.rewards.reward import OpenedReward
from hafrm_ds.saved.implicit import SavedCombinedReward, SavedImplicitReward
from hafrm_ds.saved.opening import Saved, base_of, judge_of, trained_beta
from hafrm_ds.serving.options import ServingOptions


def about(options: ServingOptions, opened: OpenedReward) -> dict[str, Any]:
    """scores: what /score gives, "reward" (the reward head), "implicit", "combined", or "composition" (or a function).
    logprobs: whether /logprobs answers. reference, beta: of its implicit rewards, null where it gives none. weights: of
    reward head and implicit reward in the combined judge, where both are given beside one another and a fit is saved.
    missing: judge -> why there is none, and what to do.
    """
    scores, logprobs, found, missing = "composition", False, {}, {}
    if not isinstance(opened, OpenedModel):
        missing["implicit"] = (
            f"{options.model} is a composition or a function, which has no policy; serve a single model to see it"
        )
    elif isinstance(saved := opened.saved, SavedImplicitReward):
        scores, logprobs = "combined" if isinstance(saved, SavedCombinedReward) else "implicit", True
        found = {"reference": str(saved.reference.folder), "beta": saved.beta}
        missing["reward"] = (
            f"the server was started with --judge {scores}; leave that out and give --credit, and it has both"
            if "reward" in saved.policy.heads
            else f"{options.model} has no reward head, or was trained without a reward loss"
        )
    else:
        scores, logprobs = "reward", "logprob" in saved.heads
        if logprobs and options.credit:
            found, missing = beside_the_head(options, saved)
        elif logprobs:
            and_what = "" if options.reference or base_of(saved) else " and --reference MODEL, what it was trained from"
            missing["implicit"] = (
                "no reference is loaded, which the policy would be measured against; start the server with --credit"
                + and_what
            )
        else:
            missing["implicit"] = f"{options.model} has no LM head; serve the final/ folder of a training"
    known = {"model": str(options.model), "scores": scores, "logprobs": logprobs}
    return known | {"reference": None, "beta": None, "weights": None} | found | {"missing": missing}


def beside_the_head(options: ServingOptions, saved: Saved) -> tuple[dict[str, Any], dict[str, str]]:
    """Say which judges a model has that scores by its reward head with its reference beside it, and why others lack."""
    beta = trained_beta(saved)
    found = {"reference": options.reference or base_of(saved), "beta": beta}
    try:
        fit = judge_of(saved)
    except ModelError as error:
        return found, {"combined": str(error)}
    return found | {"weights": [fit.weights[0], fit.weights[1] * fit.beta / beta]}, {}
