"""Hugging Face folders ⇄ Megatron checkpoints, on a CPU, a tensor at a time.

`architectures` has the tables, which are read in both directions.
"""
