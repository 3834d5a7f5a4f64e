"""How a run is stopped: Ctrl-C and SIGTERM (``docker stop``, a scheduler's time limit) are the same to it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after ``step`` steps; a checkpoint in ``output`` holds them."""

    def __init__(self, step: int, output: Path) -> None:
        super().__init__(f"Training was interrupted after step {step}; its checkpoint is kept in {output}.")
        self.step = step
        self.output = output


class Stop:
    """Whether somebody asked for a stop.

    Attributes:
        asked: true from the first signal on.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self, note: Callable[[str], None]) -> Iterator[None]:
        """While this lasts the first signal asks for a stop after the step, the second is a ``KeyboardInterrupt``.

        Args:
            note: is told what happens, in a sentence.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return

        def ask(*_: Any) -> None:
            self.asked = True
            for number in SIGNALS:
                signal.signal(number, signal.default_int_handler)
            note("Interrupted: finishing this step and saving it; interrupt again to stop at once")

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
