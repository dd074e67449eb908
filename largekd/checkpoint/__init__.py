"""Checkpoint: the commit protocol, the owners of state, retention and the export."""
