"""Removal of attention sublayers: finding them in a torch-level graph, scoring them, taking them out of a module."""
