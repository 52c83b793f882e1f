// What is kept in this browser: conversations, settings, theme. Everything works where a browser keeps nothing, until the page is closed.

const PREFIX = "nanochat.chat.";
export const MAX_CHATS = 200;

class Memory {
  #items = new Map();
  get length() { return this.#items.size; }
  key(i) { return [...this.#items.keys()][i] ?? null; }
  getItem(key) { return this.#items.get(key) ?? null; }
  setItem(key, value) { this.#items.set(key, value); }
  removeItem(key) { this.#items.delete(key); }
}
function open(name) {
  try {
    const area = window[name];
    area.setItem("nanochat.test", "");
    area.removeItem("nanochat.test");
    return area;
  } catch { return new Memory(); }  // not allowed here
}
const browser = open("localStorage"), tab = open("sessionStorage");
export const keeps = !(browser instanceof Memory);

function read(area, key, fallback) {
  try { return JSON.parse(area.getItem(key)) ?? fallback; } catch { return fallback; }
}
function write(area, key, value) {
  try { area.setItem(key, JSON.stringify(value)); return true; } catch { return false; }  // full
}
export const readSetting = (key, fallback) => read(browser, "nanochat." + key, fallback);
export const writeSetting = (key, value) => write(browser, "nanochat." + key, value);
export const readTab = (key, fallback) => read(tab, "nanochat." + key, fallback);
export const writeTab = (key, value) => write(tab, "nanochat." + key, value);

// ---------------------------------------------------------------------------
// Conversations, each under a key of its own, so that two tabs never overwrite each other's
//
//   {id, created, updated, messages, forgotten}      forgotten: so many messages no longer fit into the model's context
//   message: {role: user | assistant | console, content, note?, ...}
//     pending    the answer is not finished        refused   why the server did not take it
//     draft      text of an open editor            versions  {tails, at}: what has stood from here on, see below

export const newChat = () => ({id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), created: Date.now(), updated: Date.now(), messages: [], forgotten: 0});

const isChat = chat => Array.isArray(chat?.messages) && chat.messages.every(m => ["user", "assistant", "console"].includes(m?.role) && typeof m.content === "string");
export function loadChat(id) {
  const chat = read(browser, PREFIX + id, null);
  return isChat(chat) ? chat : null;
}
function ids() {
  return [...Array(browser.length).keys()].map(i => browser.key(i)).filter(key => key?.startsWith(PREFIX)).map(key => key.slice(PREFIX.length));
}
/* All conversations, the newest first. */
export const allChats = () => ids().map(loadChat).filter(chat => chat).sort((a, b) => b.updated - a.updated);

/* Keeps a conversation; the oldest others go where there are too many, or no space. False if it cannot be kept. */
export function saveChat(chat) {
  const {id, created, updated, messages, forgotten} = chat, value = {id, created, updated, messages, forgotten};
  if (messages.every(m => m.role === "console")) return true;
  let kept = write(browser, PREFIX + id, value);
  if (kept && ids().length <= MAX_CHATS) return true;
  const others = allChats().filter(other => other.id !== id);
  while (others.length && (!kept || others.length >= MAX_CHATS)) {
    browser.removeItem(PREFIX + others.pop().id);
    kept ||= write(browser, PREFIX + id, value);
  }
  return kept;
}
export const removeChat = id => browser.removeItem(PREFIX + id);

/* Calls back with the id of a conversation that another tab has changed. */
export function onChange(callback) {
  window.addEventListener("storage", event => { if (event.key?.startsWith(PREFIX)) callback(event.key.slice(PREFIX.length)); });
}

export const titleOf = chat => chat.messages.find(m => m.role !== "console").content.trim().slice(0, 80);

// ---------------------------------------------------------------------------
// Versions: editing a message, or answering again, replaces the tail of a conversation; the one before is kept beside it

const MAX_VERSIONS = 10;

/* Takes the messages from `at` on out of the conversation; the message that is put there next carries them along. */
export function branch(chat, at, message) {
  const tail = chat.messages.splice(at);
  const versions = tail[0]?.versions ?? {tails: [null], at: 0};
  if (tail.length) {
    delete tail[0].versions;
    versions.tails[versions.at] = tail;
    versions.tails.push(null);
    if (versions.tails.length > MAX_VERSIONS) versions.tails.shift();
    versions.at = versions.tails.length - 1;
    message.versions = versions;
  }
  chat.messages.push(message);
  forgetLess(chat, at);
}

/* Shows another version of the tail that begins at `at`. */
export function switchVersion(chat, at, version) {
  const tail = chat.messages.splice(at), versions = tail[0].versions;
  delete tail[0].versions;
  versions.tails[versions.at] = tail;
  chat.messages.push(...versions.tails[version]);
  versions.tails[version] = null;
  versions.at = version;
  chat.messages[at].versions = versions;
  forgetLess(chat, at);
}

/* Takes an answer that never began away again; the version before it comes back. */
export function withdraw(chat, message) {
  const at = chat.messages.indexOf(message), versions = message.versions;
  if (at < 0) return;
  if (!(versions?.tails.length > 1)) { chat.messages.splice(at, 1); return; }
  const gone = versions.at;
  switchVersion(chat, at, gone ? gone - 1 : 1);
  versions.tails.splice(gone, 1);
  versions.at -= versions.at > gone;
  if (versions.tails.length === 1) delete chat.messages[at].versions;
}

function forgetLess(chat, at) {
  if (chat.forgotten >= at) chat.forgotten = 0;
}

// ---------------------------------------------------------------------------
// Export

/* What the calculator did, as a person would write it. */
export const readable = text => text.replace(/<\|python_start\|>([\s\S]*?)(?:<\|python_end\|>|$)(?:<\|output_start\|>([\s\S]*?)(?:<\|output_end\|>|$))?/g,
  (_, call, result) => result === undefined ? call : `${call} = ${result}`);

const spoken = chat => chat.messages.filter(m => m.role !== "console" && m.content);

export const asMarkdown = chat => spoken(chat).map(m => `**${m.role === "user" ? "You" : "nanochat"}:**\n\n${m.role === "user" ? m.content : readable(m.content)}\n`).join("\n");

/* A conversation a line, as the CustomJSON task reads them: what was said here can be trained on. Only whole turns are. */
export function asJsonLines(chats) {
  const lines = [];
  for (const chat of chats) {
    const turns = [];
    for (const {role, content, refused} of spoken(chat)) {
      if (refused) continue;
      if (turns.at(-1)?.role === role) turns.pop();  // never answered
      if (turns.length || role === "user") turns.push({role, content});
    }
    if (turns.at(-1)?.role === "user") turns.pop();
    if (turns.length) lines.push(JSON.stringify(turns) + "\n");
  }
  return lines.join("");
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], {type}));
  const link = Object.assign(document.createElement("a"), {href: url, download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
