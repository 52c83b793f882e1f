// The settings of answers, and the theme.

import {$} from "./dom.js";
import * as store from "./store.js";

const DEFAULTS = {temperature: 0.8, top_k: 50, max_tokens: 512};
let chosen = store.readSetting("settings", {}), ofServer = {};

export const setting = name => chosen[name] ?? ofServer[name] ?? DEFAULTS[name];
export function set(name, value) {
  chosen[name] = value;
  store.writeSetting("settings", chosen);
  drawSettings();
}
/* `defaults`: the server's. */
export function useDefaults(defaults) {
  ofServer = defaults;
  drawSettings();
}
function drawSettings() {
  for (const name of Object.keys(DEFAULTS)) $(name).value = setting(name);
  $("temperature-value").textContent = Number(setting("temperature")).toFixed(2);
}
for (const name of Object.keys(DEFAULTS)) {
  const commit = () => { if ($(name).value !== "" && $(name).checkValidity()) set(name, Number($(name).value)); };
  $(name).oninput = name === "temperature" ? commit : null;
  $(name).onchange = () => { commit(); drawSettings(); };
}
$("reset").onclick = () => { chosen = {}; store.writeSetting("settings", chosen); drawSettings(); };

const root = document.documentElement;
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
$("theme").onclick = () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  store.writeSetting("theme", root.dataset.theme);
};
$("tune").onclick = () => { drawSettings(); $("settings").showModal(); };
