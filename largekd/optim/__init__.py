"""Optim: learning-rate groups by regular expression, and the learning-rate schedule."""
