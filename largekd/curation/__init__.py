"""Curation: what a model wrote, parsed, verified, filtered and made into training data."""
