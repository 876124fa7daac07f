// The page: which conversation is open, what is being written, and what the buttons do.

import { describe } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { $, announce, download, toast } from "./dom.js";
import { History } from "./history.js";
import { Run } from "./run.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { read, write } from "./storage.js";
import { watchTheme } from "./theme.js";
import { Transcript } from "./transcript.js";

const SAVE_EVERY = 2000; // milliseconds, while a reply is being written
const OPEN = "llama4.open";

class Page {
  runs = new Map(); // id of a conversation -> its run
  model = null;
  current = new Conversation();

  async start() {
    this.settings = new Settings(() => this.connect());
    this.composer = new Composer({ send: (text, pictures) => this.send(text, pictures), stop: () => this.stop() });
    this.transcript = new Transcript({
      edit: (message, text) => this.edit(message, text),
      regenerate: (message) => this.answer(this.current, message.parent),
      answerTools: (message, results) => this.answerTools(message, results),
      show: (message) => this.showVersion(message),
    });
    this.sidebar = new Sidebar({
      start: () => this.open(null),
      open: (id) => this.open(id),
      delete: (conversation) => this.delete(conversation),
      export: (conversation) => exportAll([conversation], conversation.title),
    });
    $("export-all").addEventListener("click", () => exportAll(this.conversations, "conversations"));
    $("delete-all").addEventListener("click", () => this.deleteAll());
    addEventListener("pagehide", () => this.runs.forEach((run) => this.history.put(run.conversation)));
    this.history = await History.open();
    this.history.onChange(() => this.refresh());
    await this.refresh();
    await this.open(read("sessionStorage", OPEN));
    await this.connect();
  }

  /** Who answers here. Without the right key the settings open. */
  async connect() {
    try {
      this.model = await describe(this.settings.key);
    } catch (error) {
      this.model = null;
      if (error.status === 401) this.askForKey();
      else toast(error.message, "Try again", () => this.connect());
      return;
    }
    $("model").textContent = this.model.name;
    document.title = this.model.name;
    this.composer.pictures.allow(this.model.sees);
    this.draw();
  }

  askForKey() {
    const wrong = this.settings.key ? "This API key is wrong." : "This server asks for an API key.";
    this.settings.open(wrong, "key");
  }

  /** The list of conversations, as it is stored now. */
  async refresh() {
    this.conversations = await this.history.all();
    this.drawSidebar();
  }

  async open(id) {
    const stored = id && (this.runs.get(id)?.conversation ?? this.conversations.find((conversation) => conversation.id === id));
    this.current = stored || new Conversation();
    write("sessionStorage", OPEN, stored ? id : null);
    this.draw();
    this.transcript.toEnd();
    this.composer.focus();
  }

  draw() {
    const run = this.runs.get(this.current.id);
    this.transcript.show(this.current, Boolean(run));
    const path = this.current.path();
    this.composer.draw({ isRunning: Boolean(run), used: path.findLast((message) => message.usage)?.usage.total_tokens, window: this.model?.window });
    this.drawSidebar();
  }

  drawSidebar() {
    this.sidebar.draw(this.conversations ?? [], this.current.id, this.runs);
  }

  send(text, pictures) {
    this.current.add({ role: "user", text, pictures });
    return this.answer(this.current);
  }

  edit(message, text) {
    this.current.add({ role: "user", text, pictures: message.pictures }, message.parent);
    this.composer.focus();
    return this.answer(this.current);
  }

  answerTools(message, results) {
    message.toolCalls.forEach(({ id, name }, i) => this.current.add({ role: "tool", callId: id, name, text: results[i] }));
    this.composer.focus();
    return this.answer(this.current);
  }

  showVersion(message) {
    this.current.show(message);
    this.history.put(this.current);
    this.draw();
  }

  stop() {
    this.runs.get(this.current.id)?.stop();
  }

  /** Let the model answer what stands at `parent`; another answer to it stays beside the new one. */
  async answer(conversation, parent = conversation.leaf) {
    const messages = conversation.toOpenAI(this.settings.values.system, parent);
    const message = conversation.add({ role: "assistant", text: "" }, parent);
    const run = new Run(conversation, message);
    const body = { ...this.settings.fields(), ...(this.model ? { model: this.model.name } : {}), messages };
    this.runs.set(conversation.id, run);
    write("sessionStorage", OPEN, conversation.id);
    await this.store(conversation);
    this.draw();
    this.transcript.toEnd();
    announce("Answering");

    const draw = paced(() => this.current === conversation && this.transcript.update(message));
    let saved = performance.now();
    await run.write(body, this.settings.key, () => {
      draw();
      if (performance.now() - saved < SAVE_EVERY) return;
      saved = performance.now();
      this.history.put(conversation);
    });
    this.runs.delete(conversation.id);
    if (run.isDiscarded) return;
    conversation.updated = Date.now();
    await this.store(conversation);
    if (this.current === conversation) this.draw();
    else this.drawSidebar();
    announce(message.problem ?? (message.finish === "stopped" ? "Stopped" : message.text || "The model calls a tool"));
    if (message.status === 401) this.askForKey();
  }

  async store(conversation) {
    await this.history.put(conversation);
    await this.refresh();
  }

  async delete(conversation) {
    this.runs.get(conversation.id)?.discard();
    await this.history.delete(conversation.id);
    await this.refresh();
    if (conversation.id === this.current.id) await this.open(null);
    toast(`Deleted “${conversation.title.slice(0, 40)}”`, "Undo", async () => {
      await this.store(conversation);
      await this.open(conversation.id);
    });
  }

  async deleteAll() {
    const deleted = this.conversations;
    this.runs.forEach((run) => run.discard());
    await this.history.clear();
    await this.refresh();
    await this.open(null);
    $("settings").close();
    toast(`Deleted ${deleted.length} conversations`, "Undo", async () => {
      for (const conversation of deleted) await this.history.put(conversation);
      await this.refresh();
    });
  }
}

/** Conversations as JSON, in the form of OpenAI's messages: the branch of each that is shown. */
function exportAll(conversations, name) {
  const lines = conversations.map((conversation) => {
    const { title, created, updated } = conversation;
    const times = { created: new Date(created).toISOString(), updated: new Date(updated).toISOString() };
    return { title, ...times, messages: conversation.toOpenAI("") };
  });
  const file = name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation";
  download(`${file}.json`, "application/json", JSON.stringify(lines.length === 1 ? lines[0] : lines, null, 2));
}

/** `draw` at most once a frame, and less often when it takes long, so that the page stays quick. */
function paced(draw) {
  let isWaiting = false;
  let rest = 0;
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    setTimeout(() => requestAnimationFrame(() => {
      const begun = performance.now();
      isWaiting = false;
      draw();
      rest = Math.min(500, 3 * (performance.now() - begun));
    }), rest);
  };
}

watchTheme();
new Page().start();
