// Light or dark: as the system says, until the switch is used; that of the system again is not stored.

import { $, icon } from "./dom.js";
import { write } from "./storage.js";

const NAME = "llama4.theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const chosen = () => document.documentElement.dataset.theme;
const isDark = () => (chosen() ? chosen() === "dark" : system.matches);

export function watchTheme() {
  $("theme").addEventListener("click", () => choose(isDark() ? "light" : "dark"));
  system.addEventListener("change", draw);
  draw();
}

function choose(theme) {
  const isSystem = (theme === "dark") === system.matches;
  if (isSystem) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  write("localStorage", NAME, isSystem ? null : theme);
  draw();
}

function draw() {
  $("theme").setAttribute("aria-pressed", String(isDark()));
  $("theme").title = isDark() ? "Light colours" : "Dark colours";
  $("theme").replaceChildren(icon(isDark() ? "sun" : "moon"));
}
