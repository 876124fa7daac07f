// The message box: its keys, its pictures, send and stop, and how much of the context is used.

import { $ } from "./dom.js";
import { Pictures } from "./pictures.js";

export class Composer {
  constructor({ send, stop }) {
    this.box = $("message");
    this.pictures = new Pictures(() => this.drawSend());
    this.isRunning = false;
    const submit = () => {
      const text = this.box.value.trim();
      if (this.isRunning || (!text && !this.pictures.urls.length)) return;
      this.box.value = "";
      this.drawSend();
      send(text, this.pictures.take());
    };
    $("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
    $("composer").addEventListener("click", (event) => event.target.closest("button, input") || this.focus());
    $("stop").addEventListener("click", () => (stop(), this.focus()));
    this.box.addEventListener("input", () => this.drawSend());
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isRunning && !document.querySelector("dialog[open]")) stop();
    });
  }

  focus() {
    // on a phone the keyboard would cover what was just opened
    if (matchMedia("(pointer: fine)").matches) this.box.focus({ preventScroll: true });
  }

  draw({ isRunning, used, window }) {
    const hadFocus = document.activeElement === $("stop") || document.activeElement === $("send");
    this.isRunning = isRunning;
    $("send").hidden = isRunning;
    $("stop").hidden = !isRunning;
    if (hadFocus) this.box.focus({ preventScroll: true });
    this.drawContext(used, window);
    this.drawSend();
  }

  drawContext(used, window) {
    const meter = $("context");
    meter.hidden = !used || !window;
    if (meter.hidden) return;
    const text = `${used.toLocaleString("en")} of ${window.toLocaleString("en")} tokens`;
    $("context-text").textContent = text;
    $("ring").style.setProperty("--used", String(Math.min(100, (100 * used) / window)));
    meter.classList.toggle("is-full", used > 0.9 * window);
    meter.setAttribute("aria-valuemax", String(window));
    meter.setAttribute("aria-valuenow", String(Math.min(used, window)));
    meter.setAttribute("aria-valuetext", text);
    meter.title = `Context used: ${text}`;
  }

  drawSend() {
    $("send").disabled = !this.box.value.trim() && !this.pictures.urls.length;
    if (CSS.supports("field-sizing", "content")) return;
    this.box.style.height = "auto";
    this.box.style.height = `${this.box.scrollHeight}px`;
  }
}
