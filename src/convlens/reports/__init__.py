"""Reporting: the pictures and the page of a run."""
