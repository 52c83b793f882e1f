"""The page of analysis/inside.py: one HTML file that needs nothing from anywhere."""
import math
from html import escape

import torch

from nanochat.tokenizer import special_ids

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; } td, th { padding: 1px 5px; text-align: left; } th { font-weight: 600; }
.number td { text-align: right; min-width: 3em; } .maps { display: flex; flex-wrap: wrap; gap: 10px; } figure { margin: 0; } figcaption { font-size: 12px; color: #555; }
.lens td { font: 12px ui-monospace, monospace; white-space: pre; max-width: 7em; overflow: hidden; } .scroll { overflow-x: auto; }
.context { font: 12px ui-monospace, monospace; white-space: pre-wrap; } mark { background: #ffd24d; } svg { border: 1px solid #ddd; } .note { color: #555; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; } .note, figcaption { color: #999; } svg { border-color: #444; } mark { color: #000; } }
"""
BLUE = "38, 103, 196"


def shade(share: float) -> str:
    """Of a cell, from nothing to full."""
    return f'style="background: rgba({BLUE}, {max(0.0, min(1.0, share)):.2f})"'


def visible(tokenizer, token: int) -> str:
    """A token as text, with its spaces and line breaks to be seen."""
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", errors="replace") if token not in special_ids(tokenizer) else "⟨bos⟩"
    return escape(text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥"))


def heat_map(probs: torch.Tensor, names: list[str]) -> str:
    """(T, T): queries downwards, keys to the right. Cells too faint to be seen are left out; the pointer tells the rest."""
    size = max(3, min(9, 180 // len(probs)))
    cells = "".join(f'<rect x="{key * size}" y="{query * size}" width="{size}" height="{size}" fill="rgba({BLUE},{value:.2f})"><title>{names[query]} → {names[key]}: {value:.2f}</title></rect>'
                    for query, row in enumerate(probs.tolist()) for key, value in enumerate(row) if value >= 0.02)
    side = size * len(probs)
    return f'<svg width="{side}" height="{side}" role="img">{cells}</svg>'


def scores_table(scores: dict[str, list[list[float]]]) -> str:
    rows = []
    for name, layers in scores.items():
        heads = max(map(len, layers))
        rows.append(f"<h3>{escape(name)}</h3><table class=number><tr><th></th>" + "".join(f"<th>head {head}</th>" for head in range(heads)) + "</tr>")
        rows += [f"<tr><th>layer {layer}</th>" + "".join(f"<td {shade(value)}>{value:.2f}</td>" for value in values) + "</tr>" for layer, values in enumerate(layers)]
        rows.append("</table>")
    return "".join(rows)


def lens_table(tokenizer, ids: torch.Tensor, read: list[torch.Tensor]) -> str:
    """For each layer the likeliest next token, shaded by its probability."""
    head = "<tr><th>read after</th>" + "".join(f"<th>{visible(tokenizer, int(token))}</th>" for token in ids) + "</tr>"
    rows = []
    for layer, log_probs in enumerate(read):
        best = log_probs.max(-1)
        cells = "".join(f'<td {shade(math.exp(value))} title="{math.exp(value):.2f}">{visible(tokenizer, token)}</td>' for value, token in zip(best.values.tolist(), best.indices.tolist()))
        rows.append(f"<tr><th>{'the model' if layer == len(read) - 1 else f'layer {layer}'}</th>{cells}</tr>")
    truth = [*ids[1:].tolist()]
    told = [statistics_of(log_probs, truth) for log_probs in read]
    note = ", ".join(f"{'the model' if layer == len(read) - 1 else f'layer {layer}'} {value:.2f}" for layer, value in enumerate(told))
    return f'<div class="scroll"><table class=lens>{head}{"".join(rows)}</table></div><p class=note>Nats per token of this text: {note}.</p>'


def statistics_of(log_probs: torch.Tensor, truth: list[int]) -> float:
    return -sum(log_probs[i, token].item() for i, token in enumerate(truth)) / len(truth)


def neuron_list(tokenizer, rows: torch.Tensor, values: torch.Tensor, count: int) -> str:
    """The units with the highest peaks over their own mean, and for each the five tokens on which it is largest, with what stands before them."""
    peaks = values.amax(0) / values.abs().mean(0).clamp(min=1e-9)
    parts = []
    for unit in peaks.topk(min(count, len(peaks))).indices.tolist():
        examples = []
        for place in values[:, unit].topk(min(5, len(values))).indices.tolist():
            row, column = divmod(place, rows.size(1))
            before = "".join(visible(tokenizer, int(token)) for token in rows[row, max(0, column - 8):column])
            examples.append(f'<div class=context>{before}<mark>{visible(tokenizer, int(rows[row, column]))}</mark> <span class=note>{values[place, unit].item():.2f}</span></div>')
        parts.append(f"<h4>unit {unit}</h4>{''.join(examples)}")
    return "".join(parts)


def page(name: str, model, tokenizer, ids, attention, read, scores, rows, values, twin_shares: list[float], silent: list[float], count: int) -> str:
    """attention: (H, T, T) of each layer; read: (T, V) log-probabilities after each; values: (tokens, hidden) of each on `rows`."""
    names = [visible(tokenizer, int(token)) for token in ids]
    maps = "".join(f"<h3>layer {layer}</h3><div class=maps>" + "".join(
        f"<figure>{heat_map(probs, names)}<figcaption>head {head}</figcaption></figure>" for head, probs in enumerate(heads)) + "</div>" for layer, heads in enumerate(attention))
    units = "".join(f"<h3>layer {layer}: of {each.size(1)} units {100 * dead:.0f} % hardly fire, and {100 * share:.0f} % of the others have a twin</h3>{neuron_list(tokenizer, rows, each, count)}"
                    for layer, (each, share, dead) in enumerate(zip(values, twin_shares, silent)))
    text = escape(tokenizer.decode(ids.tolist()[1:]))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Inside {escape(name)}</title><style>{STYLE}</style></head><body>
<h1>Inside {escape(name)}</h1>
<p>{len(model.transformer.h)} layers of width {model.config.n_embd}, {sum(p.numel() for p in model.parameters()):,} parameters. Text: <q>{text}</q></p>
<h2>Logit lens</h2><p class=note>Below each token what the model would say next after each layer; the darker, the surer.</p>{lens_table(tokenizer, ids, read)}
<h2>Heads</h2><p class=note>Mean attention on random tokens that come twice: to the token before; to the one after the last occurrence of the present one; to the first of all.</p>{scores_table(scores)}
<h2>Attention</h2><p class=note>Queries downwards, keys to the right.</p>{maps}
<h2>Neurons</h2><p class=note>Hidden units of the MLPs with the highest peaks, and the tokens of the validation text on which they are largest. Units that fire on 1 % of the tokens or fewer hardly do; a twin is one of the others whose values correlate with another's by more than 0.95.</p>{units}
</body></html>
"""
