"""Initialisation: a student's first weights from a teacher of another shape."""
