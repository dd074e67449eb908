"""Models: finding, building, loading and initialising teacher and student."""
