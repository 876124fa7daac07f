// Markdown -> DOM nodes. Text comes in pieces: blocks that did not change keep their nodes.

import { copyButton, element } from "./dom.js";
import { coloured } from "./code.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8; // lists and quotes inside each other; what is deeper is text
const MAX_COLUMNS = 50;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const TASK = /^\[([ xX])\] /;
const DELIMITERS = /^[ \t|:-]+$/;
const DELIMITER = /^:?-+:?$/;

/** Shows Markdown inside an element, again and again as the text grows. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.shown = []; // [key of a block, its node]
  }

  update(text, isDone) {
    const blocks = parse(text.split("\n"), 0);
    blocks.forEach((block, i) => {
      const isOpen = !isDone && i === blocks.length - 1;
      const key = `${block.kind}\n${isOpen}\n${block.source}`;
      const [shown, node] = this.shown[i] ?? [];
      if (shown === key) return;
      if (node && block.kind === "code" && this.grow(node, block, isOpen)) {
        this.shown[i][0] = key;
        return;
      }
      const made = render(block, isOpen);
      if (node) node.replaceWith(made);
      else this.container.append(made);
      this.shown[i] = [key, made];
    });
    for (const [, node] of this.shown.splice(blocks.length)) node.remove();
  }

  /** Code that is still being written only gets its new characters. */
  grow(node, block, isOpen) {
    const code = node.querySelector?.(".code code");
    const before = code?.textContent;
    if (!isOpen || !code || code.children.length || !block.text.startsWith(before)) return false;
    if (code.firstChild) code.firstChild.appendData(block.text.slice(before.length));
    else code.append(block.text);
    return true;
  }
}

/** Lines -> blocks { kind, source, ... }. */
function parse(lines, depth) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const [block, end] = read(lines, i, depth);
    blocks.push({ ...block, source: lines.slice(i, end).join("\n") });
    i = end;
  }
  return blocks;
}

function read(lines, i, depth) {
  const line = lines[i];
  if (FENCE.test(line)) return readCode(lines, i);
  if (HEADING.test(line)) {
    const [mark, level] = HEADING.exec(line);
    return [{ kind: "heading", level: level.length, text: trimHashes(line.slice(mark.length)) }, i + 1];
  }
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, i, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, i, depth);
  if (isTable(lines, i)) return readTable(lines, i);
  let end = i + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end, depth)) end++;
  return [{ kind: "paragraph", text: lines.slice(i, end).map((text) => text.trimStart()).join("\n") }, end];
}

function interrupts(lines, i, depth) {
  const line = lines[i];
  const isBlock = FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, i);
  return isBlock || (depth < MAX_DEPTH && (QUOTE.test(line) || ITEM.test(line)));
}

function trimHashes(text) {
  let end = text.trimEnd().length;
  const whole = end;
  while (text[end - 1] === "#") end--;
  return text.slice(0, end < whole && end && text[end - 1] !== " " ? whole : end).trim();
}

function readCode(lines, i) {
  const [, fence, language] = FENCE.exec(lines[i]);
  const indent = indentOf(lines[i]);
  const isEnd = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  let end = i + 1;
  while (end < lines.length && !isEnd(lines[end])) end++;
  const text = lines.slice(i + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line)))).join("\n");
  return [{ kind: "code", language, text }, Math.min(end + 1, lines.length)];
}

function readQuote(lines, i, depth) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(i, end).map((line) => line.replace(/^ {0,3}> ?/, ""));
  return [{ kind: "quote", blocks: parse(inner, depth + 1) }, end];
}

function readList(lines, i, depth) {
  const isOrdered = (mark) => mark.length > 1;
  const [, base, first] = ITEM.exec(lines[i]);
  const items = [];
  let end = i;
  while (end < lines.length) {
    const marked = ITEM.exec(lines[end]);
    const isNext = marked && marked[1].length < base.length + 2 && isOrdered(marked[2]) === isOrdered(first);
    if (!isNext || RULE.test(lines[end])) break;
    const inner = [lines[end].slice(marked[0].length)];
    const width = marked[0].length;
    for (end++; end < lines.length && belongs(lines, end, base.length, depth); end++) {
      inner.push(lines[end].slice(Math.min(width, indentOf(lines[end]))));
    }
    items.push({ blocks: parse(inner, depth + 1) });
  }
  return [{ kind: "list", isOrdered: isOrdered(first), start: parseInt(first, 10), items }, end];
}

/** Whether a line goes on with the item before it: it is indented, or its paragraph runs on. */
function belongs(lines, i, base, depth) {
  if (lines[i].trim()) {
    const isIndented = indentOf(lines[i]) >= base + 2;
    return isIndented || (Boolean(lines[i - 1].trim()) && !interrupts(lines, i, depth));
  }
  if (!lines[i - 1].trim()) return true; // as the empty line before it
  let next = i + 1;
  while (next < lines.length && !lines[next].trim()) next++;
  if (next >= lines.length) return false;
  const marked = ITEM.exec(lines[next]);
  return indentOf(lines[next]) >= base + 2 || Boolean(marked && marked[1].length === base && !RULE.test(lines[next]));
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function isTable(lines, i) {
  const next = lines[i].includes("|") ? (lines[i + 1] ?? "") : "";
  return next.includes("|") && DELIMITERS.test(next) && cells(next).every((cell) => DELIMITER.test(cell));
}

function readTable(lines, i) {
  let end = i + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const align = cells(lines[i + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "to-centre" : "to-end") : ""));
  return [{ kind: "table", align, head: cells(lines[i]), rows: lines.slice(i + 2, end).map(cells) }, end];
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return text.split(/(?<!\\)\|/).slice(0, MAX_COLUMNS).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function render(block, isOpen = false) {
  switch (block.kind) {
    case "heading":
      return element(`h${Math.min(6, block.level + 2)}`, { class: `level-${block.level}`, dir: "auto" }, inline(block.text));
    case "rule":
      return element("hr");
    case "code":
      return renderCode(block, isOpen);
    case "quote":
      return element("blockquote", {}, block.blocks.map((inner) => render(inner)));
    case "list":
      return renderList(block);
    case "table":
      return renderTable(block);
    default:
      return element("p", { dir: "auto" }, inline(block.text));
  }
}

function renderCode({ language, text }, isOpen) {
  const name = language.slice(0, 40);
  const code = element("code", {}, isOpen ? text : coloured(text, name));
  const caption = element("figcaption", {}, element("span", {}, name), copyButton("Copy the code", () => code.textContent));
  const label = name ? `Code, ${name}` : "Code";
  return element("figure", { class: "code" }, caption, element("pre", { tabindex: 0, role: "region", "aria-label": label }, code));
}

function renderList({ isOrdered, start, items }) {
  const attributes = isOrdered && start !== 1 ? { start } : {};
  return element(isOrdered ? "ol" : "ul", attributes, items.map(renderItem));
}

function renderItem({ blocks }) {
  const [first, ...rest] = blocks;
  if (first?.kind !== "paragraph") return element("li", {}, blocks.map((block) => render(block)));
  const task = TASK.exec(first.text);
  const text = task ? first.text.slice(4) : first.text;
  const isDone = task && task[1] !== " ";
  const box = task && element("input", { type: "checkbox", disabled: true, checked: isDone, "aria-label": isDone ? "Done" : "To do" });
  return element("li", { class: task ? "task" : null, dir: "auto" }, box, inline(text), rest.map((block) => render(block)));
}

function renderTable({ align, head, rows }) {
  const row = (tag, texts) =>
    element("tr", {}, head.map((_, i) => element(tag, { class: align[i] || null, dir: "auto" }, inline(texts[i] ?? ""))));
  const table = element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, rows.map((texts) => row("td", texts))));
  return element("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, table);
}
