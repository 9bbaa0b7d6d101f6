"""The live app: ``python -m demo.app``, ``make demo`` or ``streamdiff demo``."""
