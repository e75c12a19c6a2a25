"""Measured figures against their targets: parts that each compare alternatives within one run."""
