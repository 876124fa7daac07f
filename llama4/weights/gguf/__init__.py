"""GGUF, llama.cpp's format: one file, or several, with the metadata, the tokenizer and the weights."""
