"""Packed step -> log-probs: the policy, its reference, loading and export."""
