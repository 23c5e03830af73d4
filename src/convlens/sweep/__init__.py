"""Searching for a better recipe: many short trainings, judged on validation images."""
