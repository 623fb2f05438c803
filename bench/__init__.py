"""The benchmark: what a proxy costs, next to its peers, in one run. Never a timed test."""
