"""Modules of services that tutorials use beside a training, and that are not here: Google Colab and Weights & Biases.

Each stands in only where the real one is not installed, does nothing that it could be thought to do, and says so once:

    google.colab   drive.mount mounts nothing; userdata.get reads the environment, else raises as Colab does for a
                   secret that is not there; files and output do nothing. IPython's shell is not Colab's, so libraries
                   that ask whether they run there find that they do not.
    wandb          login, init, log, finish and the like report nothing. It has no ``wandb.run``, by which
                   transformers (5.23) knows that it cannot report to it.
"""

import importlib.machinery
import importlib.util
import os
import types
from collections.abc import Callable
from typing import Any

from halfbyte.errors import nearest
from halfbyte.hf.dropin.said import say
from halfbyte.hf.replacement import Replacement


class SecretNotFoundError(KeyError):
    """Colab's error for a secret that is not there."""

    def __str__(self) -> str:
        return str(self.args[0])


class NotebookAccessError(Exception):
    """Colab's error for a secret that the notebook may not see: never raised here."""


def _mount(mountpoint: str, *_: Any, **__: Any) -> None:
    say(f"google.colab.drive.mount({mountpoint!r}): there is no Google Drive here, so nothing is mounted.")


def _secret(key: str) -> str:
    if key not in os.environ:
        raise SecretNotFoundError(
            f"google.colab.userdata.get({key!r}): this is not Colab, and the environment has no {key}: set it there."
        )
    say("google.colab.userdata: secrets are read from the environment.")
    return os.environ[key]


def _nothing(name: str, gives: Any = None) -> Callable[..., Any]:
    def nothing(*_: Any, **__: Any) -> Any:
        say(f"{name}(): this is not Colab, so nothing is done.")
        return gives

    return nothing


class _Quiet(dict[str, Any]):
    """What ``wandb.init`` gives, and ``wandb.config``: takes whatever is set or called, and reports nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("config", "summary"):
            return self.setdefault(name, _Quiet())
        return self.get(name, "" if name in ("id", "name", "url") else _ignore)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __enter__(self) -> "_Quiet":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def _ignore(*_: Any, **__: Any) -> None:
    return None


def _unreported(name: str, gives: Callable[[], Any] = lambda: None) -> Callable[..., Any]:
    def report(*_: Any, **__: Any) -> Any:
        say(f"wandb.{name}(): Weights & Biases is not installed, so nothing is reported to it.")
        return gives()

    return report


COLAB: dict[str, dict[str, Any]] = {
    "google.colab": {},
    "google.colab.drive": {"mount": _mount, "flush_and_unmount": _nothing("google.colab.drive.flush_and_unmount")},
    "google.colab.userdata": {
        "get": _secret,
        "SecretNotFoundError": SecretNotFoundError,
        "NotebookAccessError": NotebookAccessError,
    },
    "google.colab.files": {
        "download": _nothing("google.colab.files.download"),
        "upload": _nothing("google.colab.files.upload", {}),
    },
    "google.colab.output": {
        "clear": _nothing("google.colab.output.clear"),
        "enable_custom_widget_manager": _nothing("google.colab.output.enable_custom_widget_manager"),
    },
    "google.colab.runtime": {"unassign": _nothing("google.colab.runtime.unassign")},
}
WANDB: dict[str, dict[str, Any]] = {
    "wandb": {
        "login": _unreported("login", lambda: False),
        "init": _unreported("init", _Quiet),
        "log": _unreported("log"),
        "finish": _ignore,
        "watch": _unreported("watch"),
        "define_metric": _ignore,
        "config": _Quiet(),
    }
}
NAMES = {"google.colab": "Google Colab", "wandb": "Weights & Biases"}


def stands_in(name: str) -> bool:
    """Whether the service ``name`` is not installed."""
    parent = name.rpartition(".")[0]
    return (parent != "" and importlib.util.find_spec(parent) is None) or importlib.util.find_spec(name) is None


def _modules(service: str, contents: dict[str, dict[str, Any]]) -> dict[str, types.ModuleType]:
    made: dict[str, types.ModuleType] = {}
    for name, values in contents.items():
        module = types.ModuleType(name, f"halfbyte in place of {name}, which is not installed.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(values)
        vars(module)["__getattr__"] = _missing(name, NAMES[service], list(values))
        made[name] = module
        parent, _, last = name.rpartition(".")
        if parent in made:
            setattr(made[parent], last, module)
    return made


def _missing(module: str, service: str, known: list[str]) -> Callable[[str], Any]:
    def missing(attribute: str) -> Any:
        if attribute.startswith("__") or attribute == "run":
            raise AttributeError(f"module {module!r} has no attribute {attribute!r}")
        raise AttributeError(
            f"{service} is not here, and halfbyte, which stands in for it, has no {module}.{attribute}"
            f"{nearest(attribute, known)}: leave it out, or install {module.partition('.')[0]}."
        )

    return missing


def rows() -> list[Replacement]:
    """What stands in for services."""
    modules: dict[str, types.ModuleType] = {}
    for service, contents in (("google.colab", COLAB), ("wandb", WANDB)):
        if stands_in(service):
            modules |= _modules(service, contents)
    if "google.colab" in modules and importlib.util.find_spec("google") is None:
        parent = types.ModuleType("google", "halfbyte in place of google, for google.colab.")
        parent.__spec__ = importlib.machinery.ModuleSpec("google", None, is_package=True)
        parent.__path__ = []
        vars(parent)["colab"] = modules["google.colab"]
        modules = {"google": parent} | modules
    return [
        Replacement(
            f"sys.modules[{name}]",
            lambda old, module=module: module,  # type: ignore[misc]
            f"import {name}, which is not installed, in a tutorial's script",
            name.partition(".")[0],
            ">=0",
        )
        for name, module in modules.items()
    ]
