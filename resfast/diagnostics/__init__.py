"""Looking at what the project computes: numerics report, pictures of training."""
