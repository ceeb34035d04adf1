"""Triton kernels; nothing of fastattn imports them before dispatch.py has chosen one.

Names: i_ an index, o_ offsets, p_ a pointer, b_ a block of numbers, m_ a mask. Q rows are M, K/V rows are N.
"""
