"""The command line's beginning: ``halfbyte`` and ``python -m halfbyte``.

Where a library is missing or broken that even the command line needs, a sentence says which and what to do.
"""

import sys


def main() -> None:
    """Run the command line and exit."""
    try:
        from halfbyte.cli import main as run
    except ImportError as error:
        first = " ".join(str(error).split())
        sys.stderr.write(f"Error: halfbyte cannot start: {first}.\n")
        lines = _faults() or [f"  → pip install --force-reinstall {(error.name or 'halfbyte').partition('.')[0]}"]
        for line in lines:
            sys.stderr.write(f"{line}\n")
        sys.exit(2)
    run()


def _faults() -> list[str]:
    """Return what is wrong with the installation, and what to paste, a line each."""
    from halfbyte.plan.doctor import installation

    return [f"{one.what} {one.value}\n  → {one.fix}" for one in installation() if one.level == "fault"]


if __name__ == "__main__":
    main()
