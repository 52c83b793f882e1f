// The end stays in sight while it grows, unless the user has scrolled away from it, is selecting text or editing.

import {$} from "./dom.js";

const scroll = $("scroll"), thread = $("thread");
let following = true, held = false, lastTop = 0;
const atBottom = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 30;
export const toBottom = () => { following = true; scroll.scrollTop = scroll.scrollHeight; };
scroll.addEventListener("scroll", () => {
  if (atBottom()) following = true;
  else if (scroll.scrollTop < lastTop) following = false;  // not where the end has only moved away since
  lastTop = scroll.scrollTop;
  $("jump").hidden = following;
}, {passive: true});
thread.addEventListener("pointerdown", () => { held = true; });
for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => { held = false; });
const observer = new ResizeObserver(() => {
  if (following && !held && !document.activeElement?.matches(".editor")) toBottom();
  $("jump").hidden = following || atBottom();
});
observer.observe(thread);
observer.observe(scroll);
$("jump").onclick = toBottom;
