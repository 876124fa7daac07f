"""Adapters: low-rank additions to a model's matrices, attached to it, trained, merged into it, read and written."""
