// One message on the screen: what was said, its pictures and tool calls, and what can be done with it.

import { $, copyButton, element, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NAMES = { user: "You", assistant: "Reply", tool: "Result of a tool" };

export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.said = element("div", { class: "said", dir: "auto" });
    this.calls = element("div", { class: "calls" });
    this.state = element("div", { class: "state" });
    this.foot = element("div", { class: "foot" });
    const pictures = (message.pictures ?? []).map(picture);
    const shown = pictures.length ? element("div", { class: "pictures" }, pictures) : null;
    this.node = element(
      "li",
      { class: `message ${message.role}`, role: "article", "aria-label": NAMES[message.role] },
      shown, this.said, this.calls, this.state, this.foot,
    );
    if (message.role === "assistant") {
      this.said.classList.add("markdown");
      this.markdown = new MarkdownView(this.said);
    }
  }

  draw({ isLast, isRunning, isBusy, versions }) {
    this.isRunning = isRunning;
    this.isLast = isLast;
    this.node.setAttribute("aria-busy", String(isRunning));
    this.write();
    if (!this.isEditing) this.drawFoot(isBusy, versions);
  }

  /** The message's text as it is now. */
  write() {
    const { role, text } = this.message;
    if (role === "assistant") this.markdown.update(text, !this.isRunning);
    else if (role === "tool") this.said.replaceChildren(toolBox(`Result of ${this.message.name}`, text));
    else if (!this.isEditing) this.said.textContent = text;
    this.writeCalls();
    this.writeState();
  }

  writeCalls() {
    const { toolCalls = [] } = this.message;
    const key = JSON.stringify([toolCalls, this.isRunning, this.isLast]);
    if (key === this.shownCalls) return;
    this.shownCalls = key;
    this.calls.replaceChildren(...toolCalls.map((call) => toolBox(`Calls ${call.name}`, pretty(call.arguments))));
    if (toolCalls.length && this.isLast && !this.isRunning) this.calls.append(this.resultForm(toolCalls));
  }

  resultForm(toolCalls) {
    const fields = toolCalls.map((call) => element("textarea", { rows: 1, name: call.id, dir: "auto" }));
    const labels = toolCalls.map((call, i) => element("label", {}, `Result of ${call.name}`, fields[i]));
    const submit = (event) => {
      event.preventDefault();
      this.actions.answerTools(this.message, fields.map((field) => field.value));
    };
    return element(
      "form",
      { class: "tool-results", on: { submit } },
      labels, element("button", { class: "button", type: "submit" }, toolCalls.length > 1 ? "Send results" : "Send result"),
    );
  }

  writeState() {
    const { text, toolCalls, problem, finish } = this.message;
    const said = [];
    if (this.isRunning && !text && !toolCalls?.length) said.push(element("div", { class: "waiting" }, element("i"), element("i"), element("i")));
    if (problem) said.push(element("p", { class: "problem" }, problem));
    else if (finish === "length") said.push(element("p", { class: "note" }, "Cut: the most tokens of a reply, or the window, were reached."));
    else if (finish === "stopped") said.push(element("p", { class: "note" }, "Stopped."));
    this.state.replaceChildren(...said);
  }

  drawFoot(isBusy, versions) {
    const { role, text } = this.message;
    const parts = [];
    if (versions.length > 1) parts.push(this.versionSwitch(versions, isBusy));
    if (!this.isRunning && role !== "tool") {
      if (text) parts.push(copyButton("Copy", () => this.message.text));
      if (!isBusy && role === "user") parts.push((this.editButton = iconButton("edit", "Edit", () => this.edit())));
      if (!isBusy && role === "assistant") parts.push(iconButton("again", "Answer again", () => this.actions.regenerate(this.message)));
      if (role === "assistant") parts.push(element("span", { class: "figures" }, figures(this.message)));
    }
    this.foot.classList.toggle("has-versions", versions.length > 1);
    this.foot.replaceChildren(...parts);
  }

  versionSwitch(versions, isBusy) {
    const at = versions.findIndex((version) => version.id === this.message.id);
    const step = (name, label, to) =>
      iconButton(name, label, () => this.actions.show(versions[to]), { disabled: isBusy || !versions[to] });
    return element(
      "span",
      { class: "versions" },
      step("before", "Version before", at - 1), `${at + 1} / ${versions.length}`, step("after", "Next version", at + 1),
    );
  }

  edit() {
    this.isEditing = true;
    const area = element("textarea", { "aria-label": "Edit your message", rows: 2, dir: "auto" });
    area.value = this.message.text;
    const end = () => {
      this.isEditing = false;
      editor.replaceWith(this.said);
      this.foot.hidden = false;
      this.editButton.focus();
    };
    const save = () => {
      end();
      const text = area.value.trim();
      if (text && text !== this.message.text) this.actions.edit(this.message, text);
    };
    const onKey = (event) => {
      if (event.key === "Escape") end();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    area.addEventListener("keydown", onKey);
    const buttons = [
      element("button", { type: "button", class: "button", on: { click: end } }, "Cancel"),
      element("button", { type: "button", class: "button primary", on: { click: save } }, "Send"),
    ];
    const editor = element("div", { class: "editor" }, area, element("div", {}, buttons));
    this.said.replaceWith(editor);
    this.foot.hidden = true;
    area.focus();
  }
}

function picture(url, i) {
  const label = `Picture ${i + 1}`;
  const open = () => {
    $("lightbox-picture").src = url;
    $("lightbox").showModal();
  };
  return element("button", { type: "button", "aria-label": `${label}, show it larger`, on: { click: open } }, element("img", { src: url, alt: label }));
}

function toolBox(title, text) {
  return element("section", { class: "tool", "aria-label": title }, element("h3", {}, icon("tool"), title), element("pre", { tabindex: 0 }, text));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** "34 tokens · 12.3 a second · first after 0.4 s" */
function figures({ tokens, seconds, wait }) {
  if (!tokens) return "";
  const parts = [`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`];
  if (tokens > 1 && seconds > 0) parts.push(`${rounded((tokens - 1) / seconds)} a second`);
  if (wait != null) parts.push(`first after ${wait < 0.095 ? wait.toFixed(2) : wait.toFixed(1)} s`);
  return parts.join(" · ");
}

const rounded = (value) => (value < 20 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
