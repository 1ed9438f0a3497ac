"""What the kernels are once compiled, read from their machine code: nothing is run, and no GPU is needed."""
