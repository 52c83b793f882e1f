"""Growth: a model that becomes wider, deeper or of higher rank in the middle of its training, and goes on as the same function.

| file | what it is |
|---|---|
| `model.py` | `grow`, the one call; its docstring has the formulas |
| `axes.py` | the axes of every parameter |
| `maps.py`, `model_maps.py` | how an axis grows; the maps of all axes of a model |
| `modes.py` | ways to widen: lossless, hyperclone, sparkling, masked, bus, identity, random |
| `lineage.py` | what each parameter continues, and which entries are new |
| `expand.py` | weights through maps, and the noise that nobody sees |
| `optimizer.py` | moments through maps, over any number of ranks |
| `added.py` | masks that open, and learning rates that re-warm, for what is new |
| `target.py` | depth: which layer continues which; the grown configuration |
| `kappa.py`, `forecast.py` | when to grow, and what the model would end with otherwise |
| `stages.py` | the stages of a run, and when each ends at the latest |
| `controller.py` | growth between two steps of a training, and its flags |
| `family.py` | one run for a family of sizes: a trunk that grows, and a branch off it for each size |
"""
from nanochat.growth.model import grow
from nanochat.growth.target import grown_config

__all__ = ["grow", "grown_config"]
