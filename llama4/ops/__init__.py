"""The operations of the model, one file each: the readable way in torch, and the faster ways.

A faster way has a predicate beside it, `unsupported_reason`: why it does not take these tensors, or None if it does.
Only this package asks it. What is above asks for an operation, and does not know which way it went; where the readable
way is its own, as with quantized matrices and experts, it gives that as a callable. The fused step alone, in
`llama4.engine`, asks what it can read. What all compiled CPU kernels have in common is in `cpu_kernels`.
"""
