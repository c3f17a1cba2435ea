"""Plans: what a fused unit computes, forward and backward, as a sequence of kernels."""
