"""Sandbox: programs that nobody has read, run in isolation and within limits."""
