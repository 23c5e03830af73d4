"""Hyperparameter search with Optuna: many short trainings, compared on validation images."""
