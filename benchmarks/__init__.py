"""Benchmarks: one command each (``python -m benchmarks.cpu`` and its siblings); see README.md in this folder."""
