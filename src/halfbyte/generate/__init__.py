"""Answers of a model: an engine for many at once, one as a stream of text, and the classes of texts."""

from halfbyte.errors import DecodingError
from halfbyte.generate.answers import Busy, Closed, Piece, Request, Stream, Usage
from halfbyte.generate.classify import Named, classify_texts
from halfbyte.generate.constraint import Constraint, Constraints
from halfbyte.generate.conversation import encode, stop_tokens
from halfbyte.generate.decoders import decoder_for
from halfbyte.generate.engine import Engine
from halfbyte.generate.figures import Figures
from halfbyte.generate.sampling import Chosen, Sampling
from halfbyte.generate.stream import check_generates, stream_reply
from halfbyte.generate.transformers_decoder import TransformersDecoder

__all__ = [
    "Busy",
    "Chosen",
    "Closed",
    "Constraint",
    "Constraints",
    "DecodingError",
    "Engine",
    "Figures",
    "Named",
    "Piece",
    "Request",
    "Sampling",
    "Stream",
    "TransformersDecoder",
    "Usage",
    "check_generates",
    "classify_texts",
    "decoder_for",
    "encode",
    "stop_tokens",
    "stream_reply",
]
