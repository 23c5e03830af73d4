"""Serve trained models over HTTP, and show runs on a local dashboard."""
