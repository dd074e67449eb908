"""Evaluation: held-out perplexity and distance to the teacher."""
