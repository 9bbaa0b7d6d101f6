"""Input side: each file is one rule between the camera and the schedule, under its own file name (SEEDS §5).

A rule may hold back chunks, lengthen the first one, or guide predictions; ``_rule.InputRule`` lists the places. They
are switched on by name: ``input_options={"freeze": {}, "rcfg": {"scale": 1.1}}``. Files are found, not listed: a new
one needs no other edit.
"""

from importlib import import_module
from pkgutil import iter_modules

from streamdiff_core.inputs._held import HeldFrames
from streamdiff_core.inputs._rule import INPUTS, InputRule, InputStage, input_rule, make_inputs

for _module in sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")):
    import_module(f"{__name__}.{_module}")

__all__ = ["INPUTS", "HeldFrames", "InputRule", "InputStage", "input_rule", "make_inputs"]
