"""The edge client: tokenizer, front layers, private data and its side of the training loop."""
