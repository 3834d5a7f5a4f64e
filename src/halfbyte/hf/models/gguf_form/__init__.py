"""A model of transformers' as llama.cpp holds it in GGUF: families, positions, tensors, words."""
