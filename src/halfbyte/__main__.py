"""``python -m halfbyte``: the command line."""

from halfbyte.cli import main

if __name__ == "__main__":
    main()
