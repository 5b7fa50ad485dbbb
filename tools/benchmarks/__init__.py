"""Benchmarks, each a script; common.py is what they share."""
