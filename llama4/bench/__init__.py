"""Benchmarks that people run on their own machine: `python -m llama4.bench NAME`."""
