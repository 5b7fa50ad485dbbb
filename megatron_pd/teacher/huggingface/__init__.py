"""A model that transformers loads as the teacher, from a folder of safetensors or a GGUF file."""
