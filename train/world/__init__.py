"""A synthetic world of judging: cases whose right verdict is known, and a small model of it.

python -m train.world.cases --rows N --split SPLIT --out FILE       write rows of it
python -m train.world.pocket --out DIR                        train pocket-base
"""

from engine.sample import POCKET

BASE = POCKET.parent / "pocket-base"  # by `train.world.pocket`; training begins from it
