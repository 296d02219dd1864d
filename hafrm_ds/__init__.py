"""hafrm_ds: a DeepSpeed trainer for hybrid reward models (HAF-RM, ACL 2025)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hafrm_ds.saved.opening import load_judge
    from hafrm_ds.saved.reward_model import HybridRewardModel

__version__ = "0.1.0"
__all__ = ["HybridRewardModel", "load_judge"]


def __getattr__(name: str):
    """Load what users import from here when they ask for it: it takes seconds, and few modules need it."""
    if name == "HybridRewardModel":
        from hafrm_ds.saved.reward_model import HybridRewardModel

        return HybridRewardModel
    if name == "load_judge":
        from hafrm_ds.saved.opening import load_judge

        return load_judge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
