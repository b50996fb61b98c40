"""Texts of hand-written kernels with slots, one file a family; `runtime.launch.load_module` makes functions of them."""
