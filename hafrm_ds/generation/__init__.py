"""Answers drawn from the policy head of a model."""
