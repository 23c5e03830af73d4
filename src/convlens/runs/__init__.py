"""Everything about a run on disk: train, resume, evaluate, compare, explain."""
