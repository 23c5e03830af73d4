"""Benchmarks: measure speed and write the tables of the docs. ``python -m benchmarks.run``."""
