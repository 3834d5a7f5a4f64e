"""A process that ends with the one that began it, however that ends: ``python -m halfbyte.deploy.ui.attached PID ...``
runs the command line so."""

import os
import runpy
import signal
import sys
import threading
import time

LOOK = 1.0
"""Seconds between two looks at whether the other process is there."""
GRACE = 5.0
"""Seconds in which a process ends by itself."""


def end_with(pid: int) -> None:
    """End this process when its parent is not the process ``pid`` any more."""

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run the command line."""
    end_with(int(sys.argv.pop(1)))
    runpy.run_module("halfbyte", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
