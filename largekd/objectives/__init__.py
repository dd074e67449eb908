"""Objectives: divergences between teacher and student and the fused pass that evaluates them over the vocabulary."""
