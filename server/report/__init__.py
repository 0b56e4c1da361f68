"""A run's report: one HTML file that a privacy officer and an ML engineer can read without us."""
