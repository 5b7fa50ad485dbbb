"""Megatron's own cached logits: its tar shards, and their conversion to logit stores."""
