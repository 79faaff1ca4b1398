"""Token ids -> packed steps: partners, order, plan, collation. Knows no framework."""
