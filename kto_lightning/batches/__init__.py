"""Batches: token ids -> partners, order, plan, packed steps. Independent of any framework."""
