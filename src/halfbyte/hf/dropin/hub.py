"""The Hugging Face hub as tutorials use it, where it cannot be reached: logins and uploads do not end a training.

What can be done is done by the libraries' own code. Where that fails because no hub is reachable, or, once a training
is over, because the hub does not let one write, a sentence says that nothing was uploaded and where the model lies.
A push that is wished for while training (``push_to_hub=True``) is looked into at the start: an answer of the hub that
forbids it is then the error that it always was.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import huggingface_hub._login
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from transformers.trainer import PREFIX_CHECKPOINT_DIR

from halfbyte.hf.dropin.loading import renamed
from halfbyte.hf.dropin.said import say
from halfbyte.hf.replacement import Replacement
from halfbyte.hub import first_line

UNREACHABLE = (OfflineModeIsEnabled, httpx.TransportError, ConnectionError, TimeoutError)
NOT_LET = (*UNREACHABLE, HfHubHTTPError, LocalTokenNotFoundError)
OWN_CHECKPOINTS = "checkpoints/*"
"""Where our trainers keep them; transformers' ``checkpoint-10``, which it does not upload either, is a link to one."""

GONE = frozenset({"use_temp_dir", "safe_serialization"})
"""Arguments of uploads that transformers 5 has no more: it does what they asked for."""

_theirs: dict[str, Callable[..., Any]] = {}


def log_in(name: str, *args: Any, **kwargs: Any) -> None:
    """Do what ``huggingface_hub``'s function ``name`` does, if the hub can be reached."""
    try:
        _theirs[name](*args, **kwargs)
    except UNREACHABLE as error:
        say(f"huggingface_hub.{name}(): the hub cannot be reached ({first_line(error)}), so nobody is logged in.")


def _keep(name: str, old: types.CodeType) -> None:
    held = getattr(huggingface_hub._login, name)
    copied = types.FunctionType(old, held.__globals__, held.__name__, held.__defaults__)
    copied.__kwdefaults__ = held.__kwdefaults__
    _theirs[name] = copied


def _login(old: types.CodeType) -> types.CodeType:
    _keep("login", old)

    def code(token, *, add_to_git_credential, skip_if_logged_in):  # type: ignore
        from halfbyte.hf.dropin.hub import log_in  # it runs in huggingface_hub's module

        log_in("login", token, add_to_git_credential=add_to_git_credential, skip_if_logged_in=skip_if_logged_in)

    return code.__code__


def _notebook_login(old: types.CodeType) -> types.CodeType:
    _keep("notebook_login", old)

    def code(*, skip_if_logged_in):  # type: ignore
        from halfbyte.hf.dropin.hub import log_in

        log_in("notebook_login", skip_if_logged_in=skip_if_logged_in)

    return code.__code__


def _interpreter_login(old: types.CodeType) -> types.CodeType:
    _keep("interpreter_login", old)

    def code(*, skip_if_logged_in):  # type: ignore
        from halfbyte.hf.dropin.hub import log_in

        log_in("interpreter_login", skip_if_logged_in=skip_if_logged_in)

    return code.__code__


def _beginning(old: Any) -> Any:
    """``Trainer.init_hf_repo``, which the constructor calls for ``push_to_hub=True``."""

    @functools.wraps(old)
    def init_hf_repo(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            old(self, *args, **kwargs)
        except UNREACHABLE as error:
            self.hub_model_id = self.push_in_progress = None
            if not self.args.push_to_hub:
                raise  # trainer.push_to_hub() tells it
            self.args.push_to_hub = False
            say(
                f"push_to_hub=True: the hub cannot be reached ({first_line(error)}), so nothing will be uploaded; the "
                f"model stays in {self.args.output_dir}."
            )

    return init_hf_repo


def _pushing(old: Any) -> Any:
    """``Trainer.push_to_hub``: the model is saved whether it can be uploaded or not."""

    @functools.wraps(old)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return old(self, *args, **kwargs)
        except NOT_LET as error:
            self.save_model(_internal_call=True)
            say(
                f"trainer.push_to_hub(): nothing was uploaded ({first_line(error)}); the model is in "
                f"{self.args.output_dir}."
            )
            return None

    return push_to_hub


def _from_checkpoint(old: Any) -> Any:
    """``Trainer._push_from_checkpoint``, in the midst of a training."""

    @functools.wraps(old)
    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        try:
            old(self, checkpoint_folder)
        except NOT_LET as error:
            say(
                f"push_to_hub=True: nothing was uploaded ({first_line(error)}); checkpoints are in {checkpoint_folder}."
            )

    return _push_from_checkpoint


def _uploading(old: Any) -> Any:
    """``model.push_to_hub``, ``tokenizer.push_to_hub`` and the like."""

    @functools.wraps(old)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        kwargs = renamed(kwargs, "push_to_hub")
        for name in GONE.intersection(kwargs):
            del kwargs[name]
            say(f"push_to_hub({name}=...) is gone, and says nothing any more.")
        try:
            return old(self, repo_id, *args, **kwargs)
        except NOT_LET as error:
            say(
                f"{type(self).__name__}.push_to_hub({repo_id!r}): nothing was uploaded ({first_line(error)}); "
                "save_pretrained keeps it here."
            )
            return None

    return push_to_hub


class _Api(HfApi):
    """Uploads a Trainer's folder without our checkpoints."""

    def upload_folder(self, **kwargs: Any) -> Any:
        ignored = kwargs.get("ignore_patterns")
        if isinstance(ignored, list) and f"{PREFIX_CHECKPOINT_DIR}-*" in ignored:
            kwargs["ignore_patterns"] = [*ignored, OWN_CHECKPOINTS]
        return super().upload_folder(**kwargs)


def _api(old: Any) -> Any:
    """transformers' way to the hub."""

    @functools.wraps(old)
    def hf_api() -> HfApi:
        api = _Api()
        vars(api).update(vars(old()))
        return api

    return hf_api


def rows() -> list[Replacement]:
    """What the hub's functions replace."""
    hub = ("huggingface_hub", ">=1.31,<3")  # as transformers; the same functions in 1.31, 1.33 and 2.4
    transformers = ("transformers", ">=5.23,<5.24")
    login = "a login where the hub cannot be reached is told, and the script goes on"
    push = "an upload that cannot be is told, and does not end a training"
    trainer = "transformers.trainer:Trainer"
    return [
        Replacement("huggingface_hub._login:login.__code__", _login, login, *hub),
        Replacement("huggingface_hub._login:notebook_login.__code__", _notebook_login, login, *hub),
        Replacement("huggingface_hub._login:interpreter_login.__code__", _interpreter_login, login, *hub),
        Replacement(f"{trainer}.init_hf_repo", _beginning, push, *transformers),
        Replacement(f"{trainer}.push_to_hub", _pushing, push, *transformers),
        Replacement(f"{trainer}._push_from_checkpoint", _from_checkpoint, push, *transformers),
        Replacement("transformers.utils.hub:PushToHubMixin.push_to_hub", _uploading, push, *transformers),
        Replacement(
            "transformers.tokenization_utils_base:PreTrainedTokenizerBase.push_to_hub",
            _uploading,
            "the same of a tokenizer, which has a copy of it",
            *transformers,
        ),
        Replacement(
            "transformers.trainer:hf_api", _api, "checkpoints of our trainers are not uploaded either", *transformers
        ),
    ]
