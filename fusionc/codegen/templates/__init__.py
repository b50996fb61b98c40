"""Texts of kernels that are written by hand around slots: matmul-like ones, which loop IR does not describe."""
