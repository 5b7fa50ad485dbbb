"""All that knows Megatron's version: its arguments, the CPU facade, patches, inference."""
