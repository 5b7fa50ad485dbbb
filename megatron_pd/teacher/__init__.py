"""The teacher: its forward pass over a corpus, and its rows on the way to the store."""
