"""What a model can read: token ids that it has an embedding for, positions that it knows."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.errors import InputError


def most_positions(model: Any) -> int | None:
    """Return how many tokens the model attends to, or None where its configuration does not say."""
    config = model.config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "dynamic":  # whose limit is that before it was stretched, unlike others'
            return int(limit * rope["factor"])
        for name, module in model.named_modules():  # RoBERTa's positions begin behind that of the padding
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return limit - int(module.padding_idx) - 1
    return limit


def check_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, largest: int, where: str) -> None:
    """Check that the embedding has a row for every token id up to ``largest``, the greatest one in ``where``.

    Raises:
        InputError: it has not; the sentence names the token.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is not None and largest >= len(weight):
        token = tokenizer.convert_ids_to_tokens(largest)
        if token is None:
            raise InputError(f"{where} holds the token id {largest}, and the model's are 0 to {len(weight) - 1}.")
        raise InputError(
            f"{where} holds the token {token!r} (id {largest}), but the model's embedding has {len(weight)} rows: "
            "tokenizer and model do not belong together. Take the model's own tokenizer, or grow the embedding with "
            "model.resize_token_embeddings() and save the model."
        )


def check_length(model: Any, longest: int, where: str, remedy: str) -> None:
    """Check that the model knows as many positions as the ``longest`` row has tokens.

    Raises:
        InputError: it does not; the sentence ends with the ``remedy``.
    """
    limit = most_positions(model)
    if limit is not None and longest > limit:
        raise InputError(f"{where} is {longest} tokens long, but the model attends to {limit}: {remedy}.")
