"""Many users of one model: the engine, and what stands behind an address."""
