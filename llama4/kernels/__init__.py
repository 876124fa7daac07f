"""Products with a weight, by the fastest right way for its device, dtype and number of rows."""
