"""Compiled kernels: C++ for CPUs and Triton for GPUs, with what Python must know of them."""
