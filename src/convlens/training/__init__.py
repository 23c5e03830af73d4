"""Training: recipes, what a step needs, the loop, checkpoints."""
