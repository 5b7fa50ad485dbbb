"""Imported in processes that are started anew beside a run without a GPU: see cpu.py."""

from megatron_pd.megatron import cpu

cpu.install()
