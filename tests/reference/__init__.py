"""The reference: caches, scores, sets and attention, against oracles in NumPy and float64."""
