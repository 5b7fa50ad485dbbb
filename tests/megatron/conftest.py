"""Megatron is imported by the tests of this folder, on whatever this machine has."""

from megatron_pd.megatron import cpu

cpu.install()
