"""Numbers of a run: meters, timers, memory, KD health, and the places they are written to."""
