"""The loop IR: what a fused kernel computes, independent of the machine that runs it."""
