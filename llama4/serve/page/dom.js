// Elements from code. Text is only ever a text node: there is no way from here to HTML.

export const $ = (id) => document.getElementById(id);

/** An element: `class`, `on` (event -> listener) and attributes; children are nodes, strings, or nothing. */
export function element(tag, { on = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, action, more = {}) {
  const attributes = { type: "button", class: "icon-button small", "aria-label": label, title: label };
  return element("button", { ...attributes, ...more, on: { click: action } }, icon(name));
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? "done" : "close"));
    announce(done ? "Copied" : "It could not be copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // not a secure address: the older way
    const area = element("textarea", { class: "unseen", readonly: true });
    area.value = text;
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

/** Tell a screen reader. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** A notice at the bottom, with one thing that can be done about it. */
export function toast(text, label, action) {
  const made = element("div", { class: "toast" }, element("span", {}, text));
  const remove = () => made.remove();
  if (label) made.append(element("button", { type: "button", on: { click: () => (remove(), action()) } }, label));
  $("toasts").replaceChildren(made);
  setTimeout(remove, label ? 8000 : 5000);
}

export function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
