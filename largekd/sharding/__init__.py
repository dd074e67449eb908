"""Sharding: the accelerator, ZeRO-3 initialisation, gathering, local shards, streamed loading."""
