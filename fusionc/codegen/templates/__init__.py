"""Kernels written by hand as text: what the loop IR does not express well (matrix instructions, register blocking)."""
