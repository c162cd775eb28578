"""Where the time and the memory of a model go: costs of op calls, timelines, traces."""
