// The list of conversations.

import { $, element, iconButton } from "./dom.js";

const DAY = 24 * 60 * 60 * 1000;

export class Sidebar {
  constructor(actions) {
    this.actions = actions;
    this.isNarrow = matchMedia("(max-width: 48rem)");
    $("new-chat").addEventListener("click", () => this.leaving(actions.start));
    $("open-sidebar").addEventListener("click", () => this.toggle(true));
    $("close-sidebar").addEventListener("click", () => this.toggle(false));
    $("scrim").addEventListener("click", () => this.toggle(false));
    $("sidebar").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isNarrow.matches) this.toggle(false);
    });
    this.isNarrow.addEventListener("change", () => this.set(!this.isNarrow.matches));
    this.set(!this.isNarrow.matches);
  }

  set(isShown) {
    document.querySelector(".app").classList.toggle("no-sidebar", !isShown);
    document.querySelector(".main").inert = isShown && this.isNarrow.matches;
    $("open-sidebar").setAttribute("aria-expanded", String(isShown));
  }

  toggle(isShown) {
    this.set(isShown);
    $(isShown ? "close-sidebar" : "open-sidebar").focus();
  }

  /** On a phone the list goes away when something of it was chosen. */
  leaving(action) {
    if (this.isNarrow.matches) this.set(false);
    action();
  }

  draw(conversations, currentId, running) {
    const days = Map.groupBy(conversations, ({ updated }) => dayOf(updated));
    const groups = [...days].map(([day, group]) => [
      element("h2", {}, day),
      element("ul", {}, group.map((conversation) => this.item(conversation, conversation.id === currentId, running.has(conversation.id)))),
    ]);
    const focused = document.activeElement?.closest?.(".conversation")?.dataset.id;
    $("conversations").replaceChildren(...groups.flat());
    if (focused) document.querySelector(`.conversation[data-id="${focused}"] .open`)?.focus();
  }

  item(conversation, isCurrent, isRunning) {
    const { id, title } = conversation;
    const open = { class: "open", type: "button", "aria-current": isCurrent ? "true" : null, dir: "auto", title };
    const { actions } = this;
    return element(
      "li",
      { class: `conversation${isCurrent ? " current" : ""}`, "data-id": id },
      element("button", { ...open, on: { click: () => this.leaving(() => actions.open(id)) } }, title),
      isRunning && element("span", { class: "answering", role: "img", "aria-label": "being answered" }),
      iconButton("export", `Export “${title}”`, () => actions.export(conversation), { title: "Export" }),
      iconButton("delete", `Delete “${title}”`, () => actions.delete(conversation), { title: "Delete" }),
    );
  }
}

function dayOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  if (time >= today - 7 * DAY) return "This week";
  return new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}
