"""Parts of this library inside other people's tools."""
