"""How much is a token worth that a small model has seen, once the model has grown? At a constant learning rate, with branches that decay.

    python -m nanochat.dataset --source='/usr/**/*.py' && python -m scripts.tok_train --vocab-size=2048
    python -m analysis.mixing --out=mixing.json --plot=dev/mixing.png

The trunk is four layers of width 128 from scratch at a constant rate. Smaller trunks grow into it in the middle and go on at that rate. The loss of the grown
model is looked up on the trunk's own curve: it is worth as many tokens D_eff as the trunk needs for it. With D_large tokens since the growth and D_small before,

    rho = (D_eff - D_large) / D_small,

so 1 says that the small model's tokens count as the large one's would have, and 0 that they were lost. Growth pays at a constant rate as long as rho exceeds the
small model's share of the FLOPs per token. Everything on fresh text (no token twice), all in the same order. Losses in bits per byte.
"""


from analysis.trials import Trial

UNIT = 256  # steps of 4,096 tokens: one token per parameter (1,048,576) of blocks and head
LARGE = {"depth": 4, "aspect-ratio": 32, "head-dim": 32, "max-seq-len": 512, "window-pattern": "L", "device-batch-size": 8, "total-batch-size": 4096,
         "eval-every": UNIT, "eval-tokens": 262144, "warmdown-ratio": 0.0, "weight-decay": 0.0,
         "unembedding-lr": 0.08, "embedding-lr": 0.15, "scalar-lr": 0.15, "matrix-lr": 0.12}
SMALL = {"4x64": {"aspect-ratio": 16, "matrix-lr": 0.24}, "1x128": {"depth": 1, "aspect-ratio": 128}}
DECAY = 0.15  # share of the steps in which a branch decays
HORIZON, SHARE = 20, 0.8  # tokens per parameter; share of them that a small model sees
TRUNK, MIXED = 30, 10  # tokens per parameter of the trunk; after a growth at a constant rate
OPERATORS: dict[str, dict[str, dict]] = {
    "4x64": {"lossless": {}, "clones": {"grow-mode": "hyperclone"}, "fresh": {"grow-theta": 0, "grow-spread": 1}, "state reset": {"grow-optimizer": "reset"}},
    "1x128": {"identity": {}, "stack": {"grow-depth-mode": "stack"}, "state reset": {"grow-optimizer": "reset"}},
}
OPERATORS_FOR = 3  # tokens per parameter that all but the first are followed for


def steps(units: float) -> int:
    return round(units * UNIT)


def trunk(seed: int, units: int, **flags) -> Trial:
    return Trial({**LARGE, "num-iterations": steps(units), "save-every": UNIT, "seed": seed, **flags})


def decayed(parent: Trial, at: int, until: int) -> Trial:
    """The branch that ends at step `until`, having decayed from `at` on."""
    return parent.branch(at, warmdown_steps=until - at)


def plan(seed: int) -> dict[str, Trial]:
    """All trainings of a seed, in the order in which they answer most."""
    large = trunk(seed, TRUNK)
    found = {"4x128": large}
    begin = steps(SHARE * HORIZON)
    for shape, flags in SMALL.items():
        small = trunk(seed, int(SHARE * HORIZON), **flags)
        found[shape] = small
        for i, (name, how) in enumerate(OPERATORS[shape].items()):
            grown = Trial({"grow-to": "4x128", "steady-steps": steps(OPERATORS_FOR if i else MIXED), "matrix-lr": LARGE["matrix-lr"], "save-every": UNIT, **how}, small, begin)
            found[f"{shape} -> 4x128, {name}"] = grown
            if i == 0:  # what it comes to at the horizon: as many tokens as scratch
                found[f"{shape} -> 4x128, {name}, decayed at {HORIZON}"] = decayed(grown, steps(HORIZON * (1 - DECAY)), steps(HORIZON))
    for units in (5, 10, HORIZON):
        found[f"4x128, decayed at {units}"] = decayed(large, steps(units * (1 - DECAY)) // UNIT * UNIT, steps(units))
    return found
