"""What can be measured of a trained model, a file for each benchmark; `nanochat/evaluations.py` lists them by name, docs/evaluation.md tells how to use them.

| file | measures |
|---|---|
| `blimp.py` | which of two sentences is the likelier one (BLiMP and all sets of its form) |
| `text.py` | perplexity and bits per byte of text files |
| `nli.py` | SNLI and MNLI: by prompting, by a linear probe, by fine-tuning |
| `superglue.py` | BoolQ, CB, COPA, MultiRC, RTE, WiC, WSC by fine-tuning |
| `decode.py` | tokens generated per second |

CORE is `core_eval.py` and `eval_bundle.py` one folder up, bits per byte `loss_eval.py`, as nanochat has them.

What they stand on: `jsonl.py` (reading rows), `scoring.py` (many sequences through the model), `classification.py` (probe and fine-tuned head),
`results.py` (rows with standard errors, in a file beside the checkpoint).
"""
