"""Ways out: a trained model in the formats of others. A new format is a file here and a line in `scripts/export.py`.

| file | what it is |
|---|---|
| `exported.py` | what is exported: a checkpoint, or a folder of an earlier export |
| `hf.py`, `hf_tokenizer.py` | a folder for transformers, and the way back |
| `modeling_nanochat.py`, `nanochat_reference.py` | the code that goes along with it: transformers' class, and the layered model in plain PyTorch |
| `onnx.py` | the decoding step as an ONNX graph |
| `base_dir.py` | a base directory for nanochat itself, or for this project on another machine |
"""
