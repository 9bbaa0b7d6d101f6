"""``python -m streamdiff_core`` is the command ``streamdiff``."""

from streamdiff_core.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
