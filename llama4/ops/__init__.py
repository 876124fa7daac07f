"""The operations of the model, one file each: the readable way in torch, and the faster ways.

A faster way has a predicate beside it, `unsupported_reason`: why it does not take these tensors, or None if it does.
What is above this package asks for an operation and does not know which way it went. What all compiled CPU kernels
have in common is in `cpu_kernels`.
"""
