"""Quantized weights: their formats, the schemes that choose among them, and the modules that multiply with them."""
