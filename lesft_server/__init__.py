"""The central server: back layers, loss, cohort, sessions and its control API."""
