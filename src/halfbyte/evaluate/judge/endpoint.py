"""A model behind OpenAI's HTTP API (``/v1/chat/completions``), asked one thing at a time: halfbyte's own server, or
anybody's.

The ``openai`` client (3.57) speaks to it: it asks again after 408, 409, 429 and errors of the server, with growing
pauses or those that the server names. What remains is told in a sentence.
"""

import os
from typing import Any, NamedTuple

from halfbyte.errors import InputError, named, nearest

KEY = "OPENAI_API_KEY"
"""The environment variable that holds the key, if the endpoint wants one."""
NO_KEY = "none"
RETRIES = 3
TIMEOUT = 600.0
"""Seconds that an answer may take; a small machine may need minutes."""
PATIENCE = 10.0
"""Seconds in which an endpoint says what models it has."""
INSTALL = "pip install 'halfbyte[eval]'"


class EndpointError(InputError):
    """The endpoint gave no answer, or refused to."""


class Reply(NamedTuple):
    """What a model answered, and why it ended there, in OpenAI's words."""

    text: str
    finish: str | None


class Endpoint:
    """An endpoint and one of its models.

    Args:
        url: with ``/v1`` at its end, where it has that.
        model: None takes the one that the endpoint has, if it is a single one.
        temperature: of answers.
        max_tokens: of an answer.
        retries: how often a thing is asked again after an error that may pass.

    Raises:
        InputError: the client is not installed, the address is none, nobody answers there, or there are several models.
    """

    def __init__(
        self, url: str, model: str | None, *, temperature: float, max_tokens: int, retries: int = RETRIES
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise InputError(f"To ask a judge takes the openai client: {INSTALL}.") from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address of an endpoint; write one such as http://127.0.0.1:8000/v1.")
        self._openai: Any = openai
        self.url = url.rstrip("/")
        self.temperature, self.max_tokens = temperature, max_tokens
        self._limit = "max_tokens"
        self._client: Any = openai.OpenAI(
            base_url=self.url, api_key=os.environ.get(KEY) or NO_KEY, timeout=TIMEOUT, max_retries=retries
        )
        self.models = self._models()
        self.model = model or self._only()

    def _models(self) -> list[str]:
        """Return the models of the endpoint; none where it is there and does not tell."""
        openai = self._openai
        try:
            listed = self._client.with_options(timeout=PATIENCE, max_retries=0).models.list()
            return [str(model.id) for model in listed.data or ()]
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._told(error) from error
        except (openai.OpenAIError, AttributeError, TypeError, ValueError):  # of an endpoint without such a list
            return []

    def _only(self) -> str:
        if len(self.models) == 1:
            return self.models[0]
        has = f"has {named(self.models)}" if self.models else "does not tell what models it has"
        raise InputError(f"{self.url} {has}; name the one that judges with --judge.")

    def ask(self, system: str, prompt: str) -> Reply:
        """Return the answer to a prompt. From any thread.

        Raises:
            EndpointError: there is none.
        """
        openai = self._openai
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        try:
            try:
                answer = self._complete(messages)
            except openai.BadRequestError as error:
                if self._limit == "max_tokens" and "max_completion_tokens" in str(error):  # OpenAI's newer models
                    self._limit = "max_completion_tokens"
                    answer = self._complete(messages)
                else:
                    raise
            choice = answer.choices[0]
            return Reply(str(choice.message.content or ""), choice.finish_reason)
        except openai.OpenAIError as error:
            raise self._told(error) from error
        except (AttributeError, TypeError, IndexError, ValueError) as error:
            raise EndpointError(
                f"{self.url} answers, but not as OpenAI's API does; name the address of such an API, which mostly ends "
                "with /v1."
            ) from error

    def _complete(self, messages: list[dict[str, str]]) -> Any:
        return self._client.chat.completions.create(
            model=self.model, messages=messages, temperature=self.temperature, **{self._limit: self.max_tokens}
        )

    def _told(self, error: Exception) -> EndpointError:
        """Return an error of the client as a sentence."""
        openai = self._openai
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        why = str(said or getattr(error, "message", "") or error).strip().split("\n")[0].rstrip(".")
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"{self.url} gave no answer within {TIMEOUT:.0f} s.")
        if isinstance(error, openai.APIConnectionError):
            cause = str(error.__cause__ or why).strip().split("\n")[0].rstrip(".")
            return EndpointError(
                f"Nobody answers at {self.url} ({cause}); start the server (halfbyte serve MODEL), or name another "
                "--endpoint."
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return EndpointError(f"{self.url} lets nobody in without its key ({why}); put it into {KEY}.")
        if isinstance(error, openai.NotFoundError):
            return EndpointError(
                f"{self.url} has no model {self.model!r}{nearest(self.model, self.models)}, or no chat completions "
                f"({why})."
            )
        return EndpointError(f"{self.url} gave no answer: {why}.")
