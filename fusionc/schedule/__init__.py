"""From a graph to kernels: which nodes share one kernel (group) and how it is run (plan)."""
