"""Weights in few bits: which, in what format, and the modules that multiply with them."""
