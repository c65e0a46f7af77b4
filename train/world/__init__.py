"""A synthetic world of judging: cases whose right verdict is known, and a small model of it.

python -m train.world.cases --rows N --split SPLIT --out FILE       write rows of it
python -m train.world.pocket --out DIR                        train the pocket model
"""

from engine.sample import POCKET

BASE = POCKET.parent / "pocket-base"  # what `train.world.pocket` has made, and training begins from
