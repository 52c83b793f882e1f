// Elements, icons, and trees of nodes (see markdown.py) that are patched into elements.

export const $ = id => document.getElementById(id);

export function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

// ---------------------------------------------------------------------------
// Icons

function svg(view, className, ...paths) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  node.setAttribute("viewBox", view);
  node.setAttribute("class", className);
  node.setAttribute("aria-hidden", "true");
  for (const attributes of paths) {
    const path = node.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
    for (const [name, value] of Object.entries(attributes)) path.setAttribute(name, value);
  }
  return node;
}
const ICONS = {
  send: "M12 19V5M6 11l6-6 6 6", stop: "M7 7h10v10H7z", copy: "M9 9h10v11H9zM5 15V4h10", edit: "M4 20h4L19 9l-4-4L4 16z",
  again: "M4 12a8 8 0 0 1 14-5l2 2M20 4v5h-5M20 12a8 8 0 0 1-14 5l-2-2M4 20v-5h5", on: "M5 5l8 7-8 7zM19 5v14", done: "M5 13l4 4L19 7", fail: "M6 6l12 12M18 6L6 18",
  before: "M15 5l-7 7 7 7", after: "M9 5l7 7-7 7", remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};
export const icon = name => svg("0 0 24 24", "icon", {d: ICONS[name]});

export function logo() {
  const spokes = [...Array(12).keys()].map(i => {
    const [x, y] = [Math.cos(i * Math.PI / 6 - Math.PI / 2), Math.sin(i * Math.PI / 6 - Math.PI / 2)], end = i % 2 ? 136 : 176;
    return `M${200 + 62 * x} ${200 + 62 * y}L${200 + end * x} ${200 + end * y}`;
  }).join("");
  return svg("0 0 400 400", "logo", {d: spokes, stroke: "url(#spokes)", "stroke-width": 26, "stroke-linecap": "round"}, {d: "M200 168L232 200L200 232L168 200Z", class: "center"});
}

export function iconButton(name, label, onclick) {
  const button = make("button", {type: "button", title: label, ariaLabel: label, onclick}, icon(name));
  button.dataset.action = name;
  return button;
}

// ---------------------------------------------------------------------------
// Copying

/* navigator.clipboard is there on https and localhost only; elsewhere the old way, which needs a selection of its own for a moment. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* not there, or not allowed */ }
  const focused = document.activeElement, selection = getSelection(), ranges = [...Array(selection.rangeCount).keys()].map(i => selection.getRangeAt(i));
  const area = make("textarea", {value: text, readOnly: true, className: "unseen"});
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus({preventScroll: true});
  if (ranges.length && focused?.selectionStart === undefined) {
    selection.removeAllRanges();
    ranges.forEach(range => selection.addRange(range));
  }
  return copied;
}

/* A button that copies what `text()` gives, and says whether it could. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    button.replaceChildren(icon(copied ? "done" : "fail"));
    button.ariaLabel = button.title = copied ? "Copied" : "The browser does not let this page copy; select the text and copy it";
    setTimeout(() => { button.replaceChildren(icon("copy")); button.ariaLabel = button.title = label; }, 1500);
  });
  return button;
}

// ---------------------------------------------------------------------------
// Trees

const TAGS = new Set("a b blockquote br code div em figcaption figure h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul".split(" "));
const CLASSES = new Set("builtin call center code comment keyword math name number right string table".split(" "));

/* An element of a node. The server makes no others, but what a model writes is worth a second look. */
function build([tag, attributes, ...children]) {
  if (tag === "copy") {
    const button = copyButton("Copy code", () => button.closest("figure").querySelector("code").textContent);
    button.tree = tag;
    return button;
  }
  const node = document.createElement(TAGS.has(tag) ? tag : "span");
  if (CLASSES.has(attributes.class)) node.className = attributes.class;
  if (attributes.title) node.title = attributes.title;
  if (tag === "ol" && attributes.start) node.start = Number(attributes.start);
  if (tag === "a" && /^(https?:\/\/|mailto:)/i.test(attributes.href)) Object.assign(node, {href: attributes.href, target: "_blank", rel: "noopener noreferrer nofollow"});
  node.tree = tag + JSON.stringify(attributes);
  patch(node, children);
  return node;
}

/* Makes the nodes the children of `parent`, and touches nothing that is right already: text that grows keeps its selection. */
export function patch(parent, nodes) {
  nodes.forEach((node, i) => {
    const old = parent.childNodes[i];
    if (typeof node === "string") {
      if (old?.nodeType !== Node.TEXT_NODE) old ? old.replaceWith(node) : parent.append(node);
      else if (node.startsWith(old.data)) { if (node.length > old.data.length) old.appendData(node.slice(old.data.length)); }
      else old.data = node;
    } else if (old?.tree === "copy" ? node[0] !== "copy" : old?.tree !== node[0] + JSON.stringify(node[1])) {
      old ? old.replaceWith(build(node)) : parent.append(build(node));
    } else if (node[0] !== "copy") {
      patch(old, node.slice(2));
    }
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}
