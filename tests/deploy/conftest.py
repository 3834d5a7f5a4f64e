"""A model, adapters over it, and a server for the tests that leave it as it was."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))

from serving import Running, running, save_adapter, save_model


@pytest.fixture(scope="session")
def base(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model."""
    folder = tmp_path_factory.mktemp("served") / "tiny-chat"
    return save_model(folder, AutoTokenizer.from_pretrained(tiny_model_folder))


@pytest.fixture(scope="session")
def adapters(base: Path) -> Path:
    """A folder with adapters: red, blue, and green, which has more layers; and stranger, of another base."""
    folder = base.parent / "adapters"
    save_adapter(base, folder / "red", 1)
    save_adapter(base, folder / "blue", 2)
    save_adapter(base, folder / "green", 3, r=2, target_modules="all-linear")
    other = save_model(base.parent / "other", AutoTokenizer.from_pretrained(base), hidden_size=32)
    save_adapter(other, folder / "stranger", 4)
    return folder


@pytest.fixture(scope="session")
def served(base: Path, adapters: Path) -> Iterator[Running]:
    """A server of it, with two adapters."""
    names = [f"{name}={adapters / name}" for name in ("red", "blue")]
    with running(base, adapter=names, adapter_folder=[str(adapters)], name="tiny") as server:
        yield server
