"""The aggregation server: rounds of adapter averaging. Needs neither torch nor transformers."""
