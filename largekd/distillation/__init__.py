"""Distillation: the model, the step, the loop and the builder that knows every room."""
