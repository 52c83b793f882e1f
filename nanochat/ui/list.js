// The list of conversations: found again, shown, deleted, exported.

import {$, iconButton, make} from "./dom.js";
import * as store from "./store.js";

let page = null;
/* `of`: {shown() the conversation on the screen, running (a Map of those that are being answered), show(one), startOver(), stop(one), save()}. */
export function attach(of) { page = of; }

const deleted = new Map();  // id: conversation, while the list is open
const day = new Intl.DateTimeFormat(undefined, {dateStyle: "medium"}), hour = new Intl.DateTimeFormat(undefined, {timeStyle: "short"});
const when = time => (new Date(time).toDateString() === new Date().toDateString() ? hour : day).format(time);
/* Deleted conversations are not kept, and come back until the list is closed. */
export const isDeleted = one => deleted.has(one.id);

function listed() {
  const running = [...page.running.keys()], kept = store.allChats();
  return [...kept.map(other => running.find(one => one.id === other.id) ?? (other.id === page.shown().id ? page.shown() : other)), ...deleted.values()].sort((a, b) => b.updated - a.updated);
}
export function drawChats() {
  const words = $("find").value.toLowerCase(), all = listed(), found = all.filter(one => !words || one.messages.some(m => m.role !== "console" && m.content.toLowerCase().includes(words)));
  $("list").replaceChildren(...found.map(one => {
    const open = make("button", {type: "button", className: "open", disabled: deleted.has(one.id), onclick: () => { if (one.id !== page.shown().id) page.show(one); $("chats").close(); }},
      make("span", {textContent: store.titleOf(one)}), make("small", {textContent: deleted.has(one.id) ? "deleted" : page.running.has(one) ? "answering" : when(one.updated)}));
    if (one.id === page.shown().id) open.ariaCurrent = "true";
    const row = make("li", {}, open, deleted.has(one.id) ? make("button", {type: "button", className: "plain", textContent: "Undo", onclick: () => restore([one])})
      : iconButton("remove", "Delete", () => remove([one])));
    return row;
  }));
  $("none").hidden = found.length > 0;
  $("none").textContent = words ? "Nothing found." : "Conversations are listed here once there are some.";
  $("find").hidden = !words && all.length < 5;
  $("remove-all").textContent = deleted.size > 1 ? "Undo all" : "Delete all";
  $("remove-all").disabled = !all.length;
  $("export-all").disabled = all.length === deleted.size;
  $("export-one").disabled = !page.shown().messages.length;
}
function remove(which) {
  for (const one of which) {
    page.stop(one);
    deleted.set(one.id, one);
    store.removeChat(one.id);
    if (one.id === page.shown().id) page.show(store.newChat());
  }
  drawChats();
  $("list").querySelector(".plain")?.focus();
}
function restore(which) {
  for (const one of which) {
    deleted.delete(one.id);
    store.saveChat(one);
  }
  drawChats();
}
$("history").onclick = () => { page.save(); $("find").value = ""; drawChats(); $("chats").showModal(); };
$("chats").onclose = () => deleted.clear();
$("find").oninput = drawChats;
$("new-here").onclick = () => { $("chats").close(); page.startOver(); };
$("remove-all").onclick = () => deleted.size > 1 ? restore([...deleted.values()]) : remove(listed().filter(one => !deleted.has(one.id)));
const today = () => new Date().toISOString().slice(0, 10);
$("export-one").onclick = () => store.download(`nanochat-${today()}.md`, "text/markdown", store.asMarkdown(page.shown()));
$("export-all").onclick = () => store.download(`nanochat-${today()}.jsonl`, "application/jsonl", store.asJsonLines(listed().filter(one => !deleted.has(one.id))));
