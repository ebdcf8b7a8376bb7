"""regraft: rewrites a live HuggingFace model onto fused kernels, verified on its own weights, and runs it."""
