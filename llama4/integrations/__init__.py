"""This library inside other tools, and other tools inside this one. What is imported here need not be installed."""
