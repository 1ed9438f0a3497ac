"""Triton kernels of the selective scan. Imports triton: only launched calls and the audit come here.

steps.py     what a program owns, and one step of the recurrence
forward.py   y; the states that chunks and backward start from
backward.py  every gradient, from states that are computed again
sums.py      partial sums to results, in a fixed order; rows that no step visits
launch.py    tensors to kernel arguments, and how the work is divided
"""
