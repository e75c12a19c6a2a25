"""The model behind OpenAI's HTTP API, for any program that speaks it."""
