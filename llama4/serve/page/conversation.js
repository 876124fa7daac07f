// A conversation as a tree: what is edited or answered again stands beside what was there before, and `leaf` says which
// of its branches is shown.

export class Conversation {
  constructor(stored = {}) {
    const now = Date.now();
    this.id = stored.id ?? newId();
    this.created = stored.created ?? now;
    this.updated = stored.updated ?? now;
    this.messages = stored.messages ?? []; // { id, parent, role, text, pictures, toolCalls, callId, ... }
    this.leaf = stored.leaf ?? null;
  }

  get title() {
    const first = this.messages.find((message) => message.role === "user");
    const text = first?.text.trim().split("\n")[0].slice(0, 80);
    return text || (first?.pictures?.length ? "A picture" : "New conversation");
  }

  find(id) {
    return this.messages.find((message) => message.id === id);
  }

  /** What is shown, from the first message to the leaf. */
  path() {
    const byId = new Map(this.messages.map((message) => [message.id, message]));
    const path = [];
    for (let at = byId.get(this.leaf); at; at = byId.get(at.parent)) path.push(at);
    return path.reverse();
  }

  /** A new message after `parent`; it is the leaf from now on. */
  add(message, parent = this.leaf) {
    const made = { id: newId(), parent, created: Date.now(), ...message };
    this.messages.push(made);
    this.leaf = made.id;
    this.updated = made.created;
    return made;
  }

  /** A message and those that stand in its place in other branches. */
  versions(message) {
    return this.messages.filter((other) => other.parent === message.parent && isSameSide(other, message));
  }

  /** Show the branch of a message, to its newest end. */
  show(message) {
    let at = message;
    for (let next = at; next; next = this.messages.findLast((other) => other.parent === at.id)) at = next;
    this.leaf = at.id;
  }

  /** What is shown, as `messages` of a request; `until` is the last one. */
  toOpenAI(system, until = this.leaf) {
    const path = this.path();
    const end = path.findIndex((message) => message.id === until) + 1;
    const said = path.slice(0, end).filter((message) => message.role !== "assistant" || message.text || message.toolCalls?.length);
    return [...(system ? [{ role: "system", content: system }] : []), ...said.map(toOpenAI)];
  }
}

function isSameSide(one, other) {
  return (one.role === "assistant") === (other.role === "assistant");
}

function toOpenAI({ role, text, pictures = [], toolCalls = [], callId }) {
  if (role === "tool") return { role, tool_call_id: callId, content: text };
  if (role === "assistant") {
    const calls = toolCalls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
    return { role, content: text || null, ...(calls.length ? { tool_calls: calls } : {}) };
  }
  if (!pictures.length) return { role, content: text };
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: text ? [...parts, { type: "text", text }] : parts };
}

function newId() {
  // crypto.randomUUID is there only for secure addresses
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
