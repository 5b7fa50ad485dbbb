"""A training run: teacher data, forward step, output processor, resolved configuration."""
