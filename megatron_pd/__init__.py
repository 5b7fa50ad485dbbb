"""Pre-training distillation (arXiv 2410.16215) for unmodified Megatron."""

__version__ = "0.1.0"
