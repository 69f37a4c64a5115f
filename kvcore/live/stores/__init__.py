"""L2: stores of chunks behind the arena."""
