// The messages of one conversation on the screen. Each keeps its elements while it is shown.

import { $ } from "./dom.js";
import { MessageView } from "./message.js";

const NEAR = 80; // pixels from the bottom that count as at the bottom

export class Transcript {
  constructor(actions) {
    this.actions = actions;
    this.views = new Map();
    this.box = $("transcript");
    this.follows = true;
    this.box.addEventListener("scroll", () => this.noteScroll(), { passive: true });
    $("latest").addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.follow()).observe($("messages"));
    new ResizeObserver(() => this.follow()).observe(this.box);
  }

  /** Draw a conversation; `isRunning` while its last message is being written. */
  show(conversation, isRunning) {
    const path = conversation.path();
    const kept = new Map();
    path.forEach((message, i) => {
      const view = this.views.get(message.id) ?? new MessageView(message, this.actions);
      const isLast = i === path.length - 1;
      view.draw({ isLast, isRunning: isRunning && isLast, isBusy: isRunning, versions: conversation.versions(message) });
      kept.set(message.id, view);
    });
    this.views = kept;
    const nodes = [...kept.values()].map((view) => view.node);
    const list = $("messages");
    const isSame = nodes.length === list.children.length && nodes.every((node, i) => node === list.children[i]);
    if (!isSame) list.replaceChildren(...nodes);
    document.querySelector(".main").classList.toggle("is-empty", !path.length);
  }

  /** Draw what has come of a message that is being written. */
  update(message) {
    this.views.get(message.id)?.write();
  }

  toEnd() {
    this.follows = true;
    this.follow();
  }

  follow() {
    if (this.follows) this.box.scrollTop = this.box.scrollHeight;
    this.noteScroll();
  }

  noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.box;
    const isAtEnd = scrollHeight - scrollTop - clientHeight < NEAR;
    if (isAtEnd || scrollTop < (this.lastTop ?? 0)) this.follows = isAtEnd; // only who scrolls up stops following
    this.lastTop = scrollTop;
    $("latest").hidden = isAtEnd;
  }
}
