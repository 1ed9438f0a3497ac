"""Triton kernels of the fused op. Imports triton: only launched calls and the audit come here.

kernel.py            their decorator: one variant for all sizes
gates.py             the activations and their slopes
conv.py              what a program owns, and the depthwise convolution of a tile
forward.py           y
backward.py          dg, di and dc
weight_gradient.py   dweight and dbias: partial sums, then their sum in a fixed order
tiles.py, tiles.json which tile is launched on which architecture
launch.py            tensors to kernel arguments
block.py             the block in inference, without u in memory; block_tiles.py, block_launch.py: as above, for these
"""
