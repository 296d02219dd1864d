"""Rounds: sample from the policy, let a reward pair the answers, train jointly again."""
