"""Starts the services as processes of one machine and reports on the run."""
