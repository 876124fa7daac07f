// The settings and their dialog. All but the key are kept in this browser; the key only as long as the tab is open.

import { $ } from "./dom.js";
import { read, write } from "./storage.js";

const NAME = "llama4.settings";
const KEY = "llama4.key";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Settings {
  constructor(onClose) {
    this.values = { system: "", tools: "", ...read("localStorage", NAME) };
    this.key = read("sessionStorage", KEY) ?? "";
    this.form = $("settings-form");
    $("open-settings").addEventListener("click", () => this.open());
    $("close-settings").addEventListener("click", () => this.save());
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.save()));
    $("settings").addEventListener("cancel", (event) => (event.preventDefault(), this.save()));
    $("settings").addEventListener("click", (event) => event.target === $("settings") && this.save());
    this.form.elements.tools.addEventListener("input", () => this.checkTools());
    this.onClose = onClose;
  }

  /** Show the dialog; with an alert and the field that it is about. */
  open(alert = "", field = "system") {
    const { elements } = this.form;
    for (const name of ["system", "tools", ...NUMBERS]) elements[name].value = this.values[name] ?? "";
    elements.key.value = this.key;
    $("settings-alert").textContent = alert;
    $("settings-alert").hidden = !alert;
    if (!$("settings").open) $("settings").showModal();
    elements[field].focus();
  }

  save() {
    this.checkTools();
    if (!this.form.reportValidity()) return;
    const { elements } = this.form;
    this.values = { system: elements.system.value.trim(), tools: elements.tools.value.trim() };
    for (const name of NUMBERS) if (elements[name].value !== "") this.values[name] = elements[name].valueAsNumber;
    this.key = elements.key.value.trim();
    write("localStorage", NAME, this.values);
    write("sessionStorage", KEY, this.key);
    $("settings").close();
    this.onClose();
  }

  checkTools() {
    const { tools } = this.form.elements;
    try {
      readTools(tools.value);
      tools.setCustomValidity("");
    } catch (error) {
      tools.setCustomValidity(`Not a JSON list of tools: ${error.message}`);
    }
  }

  /** The fields of a request that the settings decide. */
  fields() {
    const fields = {};
    for (const name of NUMBERS) if (this.values[name] != null) fields[name] = this.values[name];
    const tools = readTools(this.values.tools);
    return tools.length ? { ...fields, tools } : fields;
  }
}

function readTools(text) {
  if (!text.trim()) return [];
  const tools = JSON.parse(text);
  const isTool = (tool) => tool?.type === "function" && typeof tool.function?.name === "string";
  if (!Array.isArray(tools) || !tools.every(isTool)) throw new Error('each must be {"type": "function", "function": {"name": …}}');
  return tools;
}
