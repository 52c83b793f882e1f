// About the model: its numbers, and how it grew.

import {$, make} from "./dom.js";

const millions = n => n >= 1e9 ? (n / 1e9).toFixed(2) + " billion" : n >= 1e6 ? (n / 1e6).toFixed(n < 1e7 ? 1 : 0) + " million" : n.toLocaleString("en");
/* `info`: what the server says about it. */
export function drawInfo(info) {
  const few = list => list.length > 1 ? `${list[0]} to ${list.at(-1)}` : String(list[0]);
  const rows = {
    "Name": info.model, "Stage": {base: "base: continues text", mid: "midtraining", sft: "fine-tuned for conversation", rl: "reinforcement learning"}[info.source],
    "Depth": `${info.depth} layers`, "Width": `${info.width} channels, ${few(info.heads)} heads`,
    "Rank": few(info.ranks) === "0" ? "dense" : few(info.ranks).replace(/^0 to/, "dense or"), "Layers": info.block === "ngpt" ? "normalized (nGPT)" : "pre-norm",
    "Parameters": millions(info.parameters), "Context": `${info.context.toLocaleString("en")} tokens`, "Vocabulary": `${info.vocabulary.toLocaleString("en")} tokens`,
    "Step": info.step?.toLocaleString("en"), "Validation": info.val_bpb && `${info.val_bpb.toFixed(3)} bits per byte`,
  };
  document.querySelector("#info dl").replaceChildren(...Object.entries(rows).filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {textContent: name}), make("dd", {textContent: value})]));
  $("growth").hidden = !info.growth.length;
  const stages = info.growth.length ? [{to: info.growth[0].from}, ...info.growth] : [];
  const sizes = stages.map(stage => stage.to.split("x").map(Number)), widest = Math.max(...sizes.map(size => size[1])), deepest = Math.max(...sizes.map(size => size[0]));
  $("stages").replaceChildren(...stages.map((stage, i) => {
    const picture = make("div");
    picture.style.width = `${Math.max(1, 5 * sizes[i][1] / widest)}rem`;
    picture.style.height = `${Math.max(.6, 5 * sizes[i][0] / deepest)}rem`;
    return make("li", {}, picture, stage.to.replaceAll("x", " × "), make("small", {textContent: i ? `at step ${stage.step?.toLocaleString("en")}` : "at the start"}));
  }));
  document.querySelector("#about .name").textContent = info.model;
  document.querySelector("#about .shape").textContent = `${info.depth} × ${info.width}, ${millions(info.parameters)}`;
}
$("about").onclick = () => $("info").showModal();
