"""Who owns which block of the key/value cache. Pure Python: ids and counts, no arrays."""
