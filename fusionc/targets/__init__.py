"""From kernels to callables, one module per target: render, plan, compile (cache in front), bind."""
