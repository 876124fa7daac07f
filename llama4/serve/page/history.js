// Conversations in this browser's own database. Where it has none (a private window), they last as long as the page.

import { Conversation } from "./conversation.js";

const STORE = "conversations";

export class History {
  static async open() {
    const history = new History();
    try {
      history.database = await asPromise(Object.assign(indexedDB.open("llama4", 1), { onupgradeneeded: create }));
    } catch {
      history.database = null;
    }
    history.channel = "BroadcastChannel" in window ? new BroadcastChannel("llama4") : null;
    return history;
  }

  memory = new Map();

  /** Calls `listener` when another tab has changed something. */
  onChange(listener) {
    this.channel?.addEventListener("message", listener);
  }

  /** All conversations, the latest first. */
  async all() {
    const stored = this.database ? await asPromise(this.store("readonly").getAll()) : [...this.memory.values()];
    return stored.sort((one, other) => other.updated - one.updated).map((item) => new Conversation(item));
  }

  async put(conversation) {
    const copy = structuredClone({ ...conversation });
    if (this.database) await asPromise(this.store("readwrite").put(copy));
    else this.memory.set(copy.id, copy);
    this.channel?.postMessage(copy.id);
  }

  async delete(id) {
    if (this.database) await asPromise(this.store("readwrite").delete(id));
    else this.memory.delete(id);
    this.channel?.postMessage(id);
  }

  async clear() {
    if (this.database) await asPromise(this.store("readwrite").clear());
    this.memory.clear();
    this.channel?.postMessage(null);
  }

  store(mode) {
    return this.database.transaction(STORE, mode).objectStore(STORE);
  }
}

function create({ target }) {
  target.result.createObjectStore(STORE, { keyPath: "id" });
}

function asPromise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
