"""A model's layers made ours, by class swap and through transformers' registries."""
