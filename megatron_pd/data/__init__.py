"""Corpora on the way to training: text → tokens, and tokens with their teacher rows."""
