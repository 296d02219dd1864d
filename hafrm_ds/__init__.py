"""hafrm_ds: a DeepSpeed trainer for hybrid reward models (HAF-RM, ACL 2025)."""

__version__ = "0.1.0"
