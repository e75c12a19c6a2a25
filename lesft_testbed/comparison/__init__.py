"""`lesft-testbed compare`: many runs planned, done, tested against each other and shown."""
