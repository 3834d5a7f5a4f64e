"""How good a model is, measured on rows that it was not trained on."""

from halfbyte.evaluate.choices import ChoiceScore, score_choices

__all__ = ["ChoiceScore", "score_choices"]
