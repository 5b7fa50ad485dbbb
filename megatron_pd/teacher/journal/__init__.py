"""Rows in the order in which a training run sees their tokens, and the stores made of them.

segments    what is written while the run goes on
collect     all that was written → one store per corpus
"""
