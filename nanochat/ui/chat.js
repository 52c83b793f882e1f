// The conversation on the screen: how it is drawn, how answers come, and what the user does.

import {drawInfo} from "./about.js";
import {$, copyButton, icon, iconButton, logo, make, patch} from "./dom.js";
import {toBottom} from "./follow.js";
import * as list from "./list.js";
import {Unreachable, ask, events, post} from "./server.js";
import {set, setting, useDefaults} from "./settings.js";
import * as store from "./store.js";

const thread = $("thread"), input = $("input"), go = $("go");

let info = null;  // what the server says about the model
let chat = store.loadChat(store.readTab("current", "")) ?? store.newChat();  // the conversation on the screen
const runs = new Map();         // conversation: the AbortController of the answer that is being written; it goes on in the background
const problems = new WeakMap();  // conversation: {text, retry}
let unloaded = null;            // the same, while there is no `info`
const base = () => info?.source === "base";
const canGoOn = () => base() || info?.continue_final_message === true;
const touch = matchMedia("(hover: none) and (pointer: coarse)");  // a phone: Enter makes a line there

function save(which = chat) {
  clearTimeout(saveSoon.timers.get(which));
  saveSoon.timers.delete(which);
  if (list.isDeleted(which)) return;
  store.writeTab("current", chat.id);
  $("not-kept").hidden = store.saveChat(which) && store.keeps;
}
function saveSoon(which = chat) {
  if (!saveSoon.timers.has(which)) saveSoon.timers.set(which, setTimeout(() => save(which), 1000));
}
saveSoon.timers = new Map();

// ---------------------------------------------------------------------------
// Drawing. Elements stay the same as long as their message is there, so focus, selection and open editors do.

const views = new WeakMap();  // message: its elements
const trees = new WeakMap();  // message: {content, tree}, the last Markdown that the server has rendered

function viewOf(message) {
  let view = views.get(message);
  if (view) return view;
  if (message.role === "console") {
    view = {node: make("div", {className: "console", textContent: message.content})};
  } else {
    const body = make("div", {className: "body"}), under = make("div", {className: "under"});
    view = {node: make("article", {className: "message " + message.role}, make("h2", {className: "unseen", textContent: message.role === "user" ? "You" : "nanochat"}), body, under), body, under};
  }
  views.set(message, view);
  return view;
}

function drawMessage(message, index) {
  const view = viewOf(message), {node} = view;
  if (message.role === "console") return node;
  const busy = runs.has(chat) && message.pending;
  node.classList.toggle("busy", !!busy);
  node.classList.toggle("forgotten", index < chat.forgotten);
  node.classList.toggle("refused", !!message.refused);
  showText(message);
  drawEditor(message, view);
  const key = JSON.stringify([busy, noteOf(message), message.refused, message.versions?.at, message.versions?.tails.length, index === chat.messages.length - 1, canGoOn(), runs.has(chat)]);
  if (view.key !== key) {
    view.key = key;
    view.under.replaceChildren(...busy ? [] : buttons(message, index === chat.messages.length - 1));
  }
  return node;
}
let elsewhere = 0;  // a timer that runs while another tab writes an answer to the conversation on the screen
const noteOf = message => message.pending ? (elsewhere ? "being written in another tab" : "broken off") : message.note;

function buttons(message, last) {
  const mine = message.role === "user", found = [], at = () => chat.messages.indexOf(message);
  if (message.refused) found.push(make("span", {className: "note", textContent: message.refused}));
  else if (noteOf(message)) found.push(make("span", {className: "note", textContent: noteOf(message)}));
  if (message.versions) {
    const {at: shown, tails} = message.versions;
    const turn = (name, label, to) => Object.assign(iconButton(name, label, () => showVersion(at(), to)), {disabled: to < 0 || to >= tails.length || runs.has(chat)});
    found.push(turn("before", "Version before", shown - 1), make("span", {className: "version", textContent: `${shown + 1}/${tails.length}`}), turn("after", "Next version", shown + 1));
  }
  found.push(copyButton("Copy", () => mine ? message.content : store.readable(message.content)));
  if (mine) found.push(iconButton("edit", "Edit", () => edit(message)));
  if (!mine && last && message.content && canGoOn() && message.ended !== "stop") found.push(iconButton("on", "Go on", () => answer(message)));
  if (!mine || message.refused) found.push(iconButton("again", "Answer again", () => again(at())));
  return found;
}

/* The user's own text as it is; an answer as Markdown, once the server has rendered it; a base model's text is no Markdown. */
function showText(message) {
  const {body} = viewOf(message), tree = message.role === "assistant" && !base() && trees.get(message)?.tree;
  body.classList.toggle("plain-text", !tree);
  patch(body, tree || (message.content ? [message.content] : []));
}

function drawEditor(message, view) {
  if (message.draft === undefined) {
    view.editor?.remove();
    view.editor = null;
  } else if (!view.editor) {
    const area = make("textarea", {className: "editor", value: message.draft, rows: 1, ariaLabel: "Edit message", enterKeyHint: touch.matches ? "enter" : "send"});
    const submit = make("button", {type: "button", className: "primary", textContent: "Send", onclick: () => finishEdit(message, area.value)});
    const typed = () => { fit(area); submit.disabled = !area.value.trim(); };
    area.oninput = () => { message.draft = area.value; typed(); saveSoon(); };
    area.onkeydown = event => {
      if (sends(event)) { event.preventDefault(); if (!submit.disabled) submit.click(); }
      if (event.key === "Escape") { event.stopPropagation(); finishEdit(message, null); }
    };
    view.editor = make("div", {className: "edit"}, area, make("div", {className: "row"},
      make("button", {type: "button", className: "plain", textContent: "Cancel", onclick: () => finishEdit(message, null)}), submit));
    view.body.after(view.editor);
    queueMicrotask(typed);
  }
  view.node.classList.toggle("editing", !!view.editor);
}

const cut = make("div", {className: "cut", textContent: "the model no longer sees what is above"});
const box = make("div", {className: "problem"});
box.setAttribute("role", "alert");

/* The trouble there is, or what is left undone since the page was left. */
function trouble() {
  const known = unloaded ?? problems.get(chat), last = chat.messages.findLast(m => m.role !== "console");
  if (known) return known;
  if (!last || !info || runs.has(chat) || last.refused || elsewhere) return null;
  if (last.role === "user") return {text: "This message has no answer yet.", action: "Answer", retry, mild: true};
  if (last.pending && last.content && canGoOn()) return {text: "The answer broke off when the page was left.", action: "Go on", retry: () => answer(last), mild: true};
  if (last.pending) return {text: "The answer broke off when the page was left.", action: "Answer again", retry, mild: true};
  return null;
}
function drawTrouble(found) {
  const key = JSON.stringify(found);
  if (box.dataset.key === key && box.isConnected) return;
  box.dataset.key = key;
  box.classList.toggle("mild", !!found.mild);
  const parts = [make("span", {textContent: found.text})];
  if (found.retry) parts.push(make("button", {className: "plain", textContent: found.action ?? "Try again", onclick: () => trouble()?.retry()}));
  box.replaceChildren(...parts);
}

function draw() {
  const wanted = chat.messages.map(drawMessage), found = trouble();
  if (chat.forgotten) wanted.splice(chat.forgotten, 0, cut);
  if (!chat.messages.length && info) wanted.push(thread.querySelector("#welcome") ?? welcome());
  if (found) { drawTrouble(found); wanted.push(box); }
  const keep = new Set(wanted);
  for (const node of [...thread.children]) if (!keep.has(node)) node.remove();
  wanted.forEach((node, i) => { if (thread.children[i] !== node) thread.insertBefore(node, thread.children[i] ?? null); });
  thread.ariaBusy = String(runs.has(chat));
  drawButton();
  render();
}

function drawButton() {
  const label = runs.has(chat) ? "Stop" : "Send";
  if (go.title !== label) {
    go.replaceChildren(icon(label.toLowerCase()));
    go.title = go.ariaLabel = label;
  }
  go.disabled = !runs.has(chat) && !input.value.trim();
}

function welcome() {
  const starters = base() ? ["Once upon a time", "The capital of France is", "def fibonacci(n):"] : ["Why is the sky blue?", "How many r are in strawberry?", "Write a haiku about growing."];
  return make("div", {id: "welcome"}, logo(), make("h1", {textContent: base() ? "Write, and it goes on" : "Ask it something"}),
    make("p", {textContent: base() ? "This is a base model. It knows no conversation: it continues the text that you begin." : "A small language model, trained from nothing. It can be wrong about anything."}),
    make("div", {className: "starters"}, ...starters.map(text => make("button", {type: "button", textContent: text, onclick: () => send(text)}))));
}

function fit(area) {
  area.style.height = "auto";
  area.style.height = Math.min(area.scrollHeight + area.offsetHeight - area.clientHeight, 200) + "px";
}
function announce(text) { $("status").textContent = text; }

// ---------------------------------------------------------------------------
// Answers

const MAX_BATCH = 20, MAX_BATCH_TEXT = 100_000;
let rendering = null;
/* Lets the server render the answers on the screen that have changed, until none has: a growing one takes up to a quarter of the time. */
function render() {
  return rendering ??= Promise.resolve().then(renderAll);
}
async function renderAll() {
  for (;;) {
    const stale = [];
    let size = 0;
    for (const message of info && !base() ? chat.messages.toReversed() : []) {
      if (message.role !== "assistant" || !message.content || trees.get(message)?.content === message.content) continue;
      size += message.content.length;
      if (stale.length && (size > MAX_BATCH_TEXT || stale.length === MAX_BATCH)) break;
      stale.push([message, message.content]);
    }
    const began = performance.now();
    const answered = stale.length && await post("/render", {texts: stale.map(([, text]) => text)}, AbortSignal.timeout(10_000)).then(r => r.json()).catch(() => null);
    if (!answered) { rendering = null; return; }  // done, or not possible now: what is not rendered is shown as it is
    stale.slice(0, answered.trees.length).forEach(([message, content], i) => {  // the server has its time: the rest comes with the next turn
      trees.set(message, {content, tree: answered.trees[i]});
      showText(message);
    });
    await new Promise(resolve => setTimeout(resolve, Math.max(80, 3 * (performance.now() - began))));
  }
}

/* The server's answer to what stands before `message`, or to go on with it; what no longer fits into the context is left out. */
async function request(message, signal, which) {
  const before = which.forgotten;
  for (;;) {
    const at = which.messages.indexOf(message);
    const said = which.messages.slice(which.forgotten, at + (message.content ? 1 : 0)).filter(m => m.role !== "console" && m.content && !m.refused);
    try {
      return await post("/chat/completions", {
        messages: said.map(({role, content}) => ({role, content})), temperature: setting("temperature"), top_k: setting("top_k"), max_tokens: setting("max_tokens"),
        ...message.content && !base() && {continue_final_message: true},
      }, signal);
    } catch (error) {
      const next = error.code === "context_length_exceeded" ? which.messages.findIndex((m, i) => i > which.forgotten && i < at && m.role === "user" && !m.refused) : -1;
      if (next < 0) { which.forgotten = before; throw error; }
      which.forgotten = next;
    }
  }
}

/* Writes the answer `message`, which stands at the end of the conversation. */
async function answer(message, which = chat) {
  const run = new AbortController();
  let tokens = 0, first = 0, frame = 0, done = null;
  runs.set(which, run);
  problems.delete(which);
  for (const earlier of which.messages.filter(m => m.pending)) {  // the page was left while it was written
    delete earlier.pending;
    earlier.ended = earlier.note = "broken off";
  }
  message.pending = true;
  which.updated = Date.now();
  save(which);
  draw();
  toBottom();
  announce("nanochat is answering");
  try {
    const response = await request(message, run.signal, which);
    setOnline(true);
    if (which === chat && which.forgotten) draw();
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error);
      if (event.done) { done = event; continue; }
      first ||= performance.now();
      tokens++;
      message.content += event.token;
      saveSoon(which);
      if (which !== chat) continue;
      if (base()) frame ||= requestAnimationFrame(() => { frame = 0; showText(message); });
      else render();
    }
    if (!done) throw new Unreachable("The connection broke off.");
    const seconds = (performance.now() - first) / 1000, speed = seconds > .1 ? (tokens - 1) / seconds : 0;
    message.ended = done.finish_reason;
    message.note = `${done.completion_tokens} tokens` + (speed ? `, ${speed < 10 ? speed.toFixed(1) : Math.round(speed)} per second` : "");
    if (done.finish_reason === "length") message.note += done.completion_tokens < setting("max_tokens") ? "; the model's context is full" : "; the longest answer allowed";
  } catch (error) {
    if (leaving) return;  // the next page offers to go on
    fail(error, message, run, which);
  }
  if (which === chat && message.content) await render();
  delete message.pending;
  which.updated = Date.now();
  const last = runs.get(which) === run;  // else another one has begun
  if (last) runs.delete(which);
  save(which);
  if (which !== chat) return;
  draw();
  if (last && message.content) announce(`nanochat: ${viewOf(message).body.innerText.slice(0, 2000)}`);
}

function fail(error, message, run, which) {
  message.ended = message.note = run.signal.aborted ? "stopped" : "broken off";
  const question = which.messages.slice(0, which.messages.indexOf(message)).findLast(m => m.role === "user");
  if (!message.content) store.withdraw(which, message);
  if (run.signal.aborted) return;
  if (error instanceof Unreachable) setOnline(false);
  if ([400, 413, 422].includes(error.status) && question && !message.content) question.refused = `not answered: ${error.message}`;
  else problems.set(which, {text: error.message, retry});
}

const stop = (which = chat) => runs.get(which)?.abort();

let poll = 0, leaving = false;
function setOnline(online) {
  document.body.classList.toggle("offline", !online);
  document.querySelector("#about i").ariaLabel = online ? "connected" : "not connected";
  clearTimeout(poll);
  if (!online) poll = setTimeout(async () => {
    try {
      await ask("/health");
    } catch (error) {
      if (error instanceof Unreachable) return setOnline(false);
    }
    await load();
    if (unloaded) return draw();
    if (problems.has(chat)) problems.get(chat).text = "The server is back.";
    draw();
  }, 2000);
}
addEventListener("pagehide", () => {
  leaving = true;
  for (const which of new Set([chat, ...runs.keys()])) save(which);
});
addEventListener("pageshow", () => { leaving = false; });

// ---------------------------------------------------------------------------
// What the user does

const newAnswer = () => ({role: "assistant", content: ""});
const newQuestion = text => ({role: "user", content: base() ? text : text.trim()});

function send(text) {
  const message = newAnswer();
  chat.messages.push(newQuestion(text), message);
  answer(message);
}
/* Answers anew from `index` on: a question or an answer. */
function again(index) {
  const message = newAnswer();
  stop();
  const asked = chat.messages[index].role === "user";
  if (asked) delete chat.messages[index].refused;
  store.branch(chat, asked ? index + 1 : index, message);
  answer(message);
}
function retry() {
  problems.delete(chat);
  const last = chat.messages.findLastIndex(m => m.role !== "console");
  again(last);
}
function showVersion(index, version) {
  store.switchVersion(chat, index, version);
  problems.delete(chat);
  save();
  draw();
}

function edit(message) {
  message.draft ??= message.content;
  save();
  draw();
  viewOf(message).editor.querySelector("textarea").focus();
}
/* Sends the new text, or null: leaves everything as it is. */
function finishEdit(message, text) {
  delete message.draft;
  if (text === null) {
    save();
    draw();
    input.focus();
    return;
  }
  const next = newAnswer();
  stop();
  store.branch(chat, chat.messages.indexOf(message), newQuestion(text));
  chat.messages.push(next);
  input.focus();
  answer(next);
}

function show(which) {
  save();
  chat = which;
  store.writeTab("current", chat.id);
  draw();
  toBottom();
}
function startOver() {
  show(store.newChat());
  input.focus();
}

/* [setting, lowest, highest] */
const SETTINGS = {temperature: ["temperature", 0, 2], topk: ["top_k", 0, 200], maxtokens: ["max_tokens", 1, 4096]};
const HELP = `/temperature 0..2: how varied answers are
/topk 0..200: tokens to choose among, 0 for all
/maxtokens 1..4096: the longest answer
/clear: a new conversation
Any other text is a message, also where it begins with a slash.`;
const KEYS = `

Enter sends, Shift+Enter makes a new line, Esc stops, ↑ edits the last message, Ctrl+Shift+N or Alt+N begins a new conversation.`;

/* Whether the text is a command, which it obeys; one with a wrong value stays in the input. */
function command(text) {
  const [, name, value] = /^\/(help|clear|temperature|topk|maxtokens)(?:\s+(\S+))?$/.exec(text.trim()) ?? [];
  if (!name || value && !SETTINGS[name]) return false;
  input.value = "";
  if (name === "clear") { startOver(); return true; }
  let reply = touch.matches ? HELP : HELP + KEYS;
  if (SETTINGS[name]) {
    const [key, low, high] = SETTINGS[name], number = Number(value);
    if (value === undefined) reply = `${key} is ${setting(key)}`;
    else if (number >= low && number <= high && (key === "temperature" || Number.isInteger(number))) { set(key, number); reply = `${key} is now ${number}`; }
    else { input.value = text; reply = `${key} goes from ${low} to ${high}`; }
  }
  const said = {role: "console", content: reply}, last = chat.messages.length - 1;
  chat.messages.splice(runs.has(chat) && last >= 0 ? last : last + 1, 0, said);  // an answer that is being written stays the last
  save();
  draw();
  toBottom();
  return true;
}

function typed() {
  fit(input);
  drawButton();
  store.writeTab("draft", input.value);
}
$("composer").onsubmit = event => {
  event.preventDefault();
  const text = input.value;
  if (!text.trim()) return;
  if (!command(text)) {
    if (runs.has(chat)) return announce("nanochat is still answering; Escape stops it");
    input.value = "";
    send(text);
  }
  typed();
};
go.onclick = event => { if (runs.has(chat)) { event.preventDefault(); stop(); } };
input.oninput = typed;
const sends = event => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && (!touch.matches || event.ctrlKey || event.metaKey);
input.onkeydown = event => {
  if (sends(event)) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !input.value) {
    const last = chat.messages.findLast(m => m.role === "user");
    if (last) { event.preventDefault(); edit(last); }
  }
};
const hint = () => { input.enterKeyHint = touch.matches ? "enter" : "send"; };
touch.onchange = hint;
hint();
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
  if (event.code === "KeyN" && (event.altKey || event.ctrlKey && event.shiftKey)) { event.preventDefault(); startOver(); }
});

$("new").onclick = startOver;
list.attach({shown: () => chat, running: runs, show, startOver, stop, save});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.onclick = event => { if (event.target === dialog || event.target.closest("[data-close]")) dialog.close(); };
}

store.onChange(id => {  // in another tab
  const changed = id === chat.id && !runs.has(chat) && !chat.messages.some(m => m.draft !== undefined) && store.loadChat(id);
  if (changed) {
    chat = changed;
    clearTimeout(elsewhere);
    elsewhere = setTimeout(() => { elsewhere = 0; draw(); }, 3000);  // it keeps an answer every second
    draw();
  }
  if ($("chats").open) list.drawChats();
});

async function load() {
  try {
    info = await (await ask("/info")).json();
    setOnline(true);
    drawInfo(info);
    useDefaults(info.defaults);
    input.placeholder = base() ? "Begin a text" : "Message";
    document.title = `nanochat: ${info.model}`;
    unloaded = null;
  } catch (error) {
    unloaded = {text: error.message, retry: () => load().then(draw)};
    setOnline(!(error instanceof Unreachable));
  }
}

$("about").prepend(logo());
input.value = store.readTab("draft", "");
$("not-kept").hidden = store.keeps;
draw();
typed();
load().then(() => { draw(); toBottom(); });
