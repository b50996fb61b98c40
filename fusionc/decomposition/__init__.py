"""Large convolution kernels as sums of cheaper ones: forms, how well they fit, what they cost, and how a graph runs them."""
