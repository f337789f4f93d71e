"""The demonstration: a small language model, a real task and an over-confident adapter, end to end on a CPU."""
