"""The ops a model is written over: one interface, one implementation a backend."""
