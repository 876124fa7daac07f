// Markdown inside a paragraph -> DOM nodes, in one pass over the text. What is no markup stays text.

import { element } from "./dom.js";

const MAX_LENGTH = 20000; // characters of one paragraph; longer ones are plain text
const MAX_OPEN = 16; // marks that are open at once, so that nodes nest no deeper
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ADDRESS = /https?:\/\/[^\s<>"'`]+/y;
const TAGS = { "*1": "em", "_1": "em", "*2": "strong", "_2": "strong", "~2": "s" };

/** The address if it is one that may be followed: http or https, in full; else null. */
export function safeAddress(text) {
  try {
    const { protocol, href } = new URL(text);
    return protocol === "https:" || protocol === "http:" ? href : null;
  } catch {
    return null;
  }
}

export function link(href, ...children) {
  return element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

/** Nodes of a paragraph. */
export function inline(text) {
  return text.length > MAX_LENGTH ? [text] : new Inline(text).parse();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.nodes = [];
    this.pending = "";
    this.open = []; // marks that wait for their other half: { key, at: index of their node }
    this.unclosed = new Set(); // lengths of backtick runs that have no second one
  }

  parse() {
    const { text } = this;
    for (let i = 0; i < text.length; ) i = this.step(i);
    this.flush();
    return this.nodes;
  }

  /** Reads what stands at i; returns where it ends. */
  step(i) {
    const c = this.text[i];
    if (c === "\\" && PUNCTUATION.test(this.text[i + 1] ?? "")) return this.say(this.text[i + 1], i + 2);
    if (c === "\n" || (c === "\\" && this.text[i + 1] === "\n")) return this.lineBreak(i);
    if (c === "`") return this.code(i);
    if (c === "*" || c === "_" || c === "~") return this.mark(i);
    if (c === "[") return this.bracket(i, 1);
    if (c === "!" && this.text[i + 1] === "[") return this.bracket(i, 2);
    if (c === "]") return this.closeBracket(i);
    if (c === "h" || c === "<") return this.address(i);
    return this.say(c, i + 1);
  }

  say(text, end) {
    this.pending += text;
    return end;
  }

  flush() {
    if (this.pending) this.nodes.push(document.createTextNode(this.pending));
    this.pending = "";
  }

  add(node) {
    this.flush();
    this.nodes.push(node);
  }

  lineBreak(i) {
    this.pending = this.pending.trimEnd();
    this.add(element("br"));
    let end = i + (this.text[i] === "\\" ? 2 : 1);
    while (this.text[end] === " ") end++;
    return end;
  }

  run(i) {
    let end = i;
    while (this.text[end] === this.text[i]) end++;
    return end;
  }

  code(i) {
    const start = this.run(i);
    const length = start - i;
    for (let at = start; !this.unclosed.has(length); ) {
      at = this.text.indexOf("`", at);
      if (at < 0) break;
      const end = this.run(at);
      if (end - at === length) {
        const inner = this.text.slice(start, at).replaceAll("\n", " ");
        const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
        this.add(element("code", {}, padded ? inner.slice(1, -1) : inner));
        return end;
      }
      at = end;
    }
    this.unclosed.add(length);
    return this.say(this.text.slice(i, start), start);
  }

  mark(i) {
    const c = this.text[i];
    const end = this.run(i);
    const before = this.text[i - 1] ?? " ";
    const after = this.text[end] ?? " ";
    const inWord = c === "_" && isWord(before) && isWord(after);
    let left = end - i;
    if (left > 3 || (c === "~" && left !== 2) || inWord) return this.say(this.text.slice(i, end), end);
    const mayClose = !isSpace(before);
    const mayOpen = !isSpace(after);
    for (const length of left === 3 ? [1, 2] : [left]) {
      if (mayClose && this.close(c + length)) left -= length;
    }
    if (!left) return end;
    for (const length of left === 3 ? [2, 1] : [left]) {
      if (mayOpen && this.open.length < MAX_OPEN) this.begin(c + length, c.repeat(length));
      else this.say(c.repeat(length));
    }
    return end;
  }

  begin(key, text) {
    this.add(document.createTextNode(text));
    this.open.push({ key, at: this.nodes.length - 1 });
  }

  close(key) {
    const found = this.open.findLastIndex((mark) => mark.key === key);
    if (found < 0 || this.open.slice(found).some((mark) => mark.key === "[")) return false;
    const inner = this.since(found);
    if (!inner.length) return false;
    this.wrap(found, element(TAGS[key], {}, inner));
    return true;
  }

  since(found) {
    this.flush();
    return this.nodes.slice(this.open[found].at + 1);
  }

  wrap(found, node) {
    this.nodes.length = this.open[found].at;
    this.open.length = found;
    this.nodes.push(node);
  }

  bracket(i, length) {
    const end = i + length;
    const text = this.text.slice(i, end);
    if (this.open.length >= MAX_OPEN) return this.say(text, end);
    this.begin("[", text);
    return end;
  }

  /** `](address "title")` makes a link of what stands since the bracket; a picture becomes a link, too. */
  closeBracket(i) {
    const found = this.open.findLastIndex((mark) => mark.key === "[");
    const target = found >= 0 && this.text[i + 1] === "(" ? this.target(i + 2) : null;
    const href = target && safeAddress(target.address);
    if (!href) {
      if (found >= 0) this.open.splice(found, 1);
      return this.say("]", i + 1);
    }
    const inner = this.since(found);
    this.wrap(found, link(href, inner.length ? inner : href));
    this.open = this.open.filter((mark) => mark.key !== "["); // no link inside a link
    return target.end;
  }

  target(start) {
    let depth = 1;
    let end = start;
    for (; end < this.text.length && end - start < 2000; end++) {
      const c = this.text[end];
      if (c === "\n") return null;
      if (c === "(") depth++;
      if (c === ")" && --depth === 0) break;
    }
    if (this.text[end] !== ")") return null;
    const [address] = this.text.slice(start, end).trim().split(" ");
    return { address: address.replace(/^<|>$/g, ""), end: end + 1 };
  }

  address(i) {
    const isPointed = this.text[i] === "<";
    ADDRESS.lastIndex = isPointed ? i + 1 : i;
    const found = isWord(this.text[i - 1] ?? " ") ? null : ADDRESS.exec(this.text);
    const isInLink = this.open.some((mark) => mark.key === "[");
    if (!found || isInLink || (isPointed && this.text[ADDRESS.lastIndex] !== ">")) return this.say(this.text[i], i + 1);
    let text = found[0];
    if (!isPointed) while (/[.,;:!?*_~\]]$/.test(text) || (text.endsWith(")") && !text.includes("("))) text = text.slice(0, -1);
    const href = safeAddress(text);
    if (!href) return this.say(this.text[i], i + 1);
    this.add(link(href, text));
    return i + text.length + (isPointed ? 2 : 0);
  }
}

const isSpace = (c) => /\s/.test(c);
const isWord = (c) => /[\p{L}\p{N}]/u.test(c);
