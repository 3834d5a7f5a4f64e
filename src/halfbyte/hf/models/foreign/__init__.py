"""Models in others' number formats, read tensor by tensor as dense ones: GGUF, GPTQ and AWQ."""
