"""Checkpoints: lazy sources, name tables, strict loading, atomic saving. Works on names and never imports the model."""
