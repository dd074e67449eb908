"""Teachers: sources of signals."""
