"""``python -m tfb_ext``: the same as the command ``tfb``."""

from .app.cli import main

if __name__ == "__main__":
    main()
