// Colours for code: notes, texts, numbers and the words that most languages share.

import { element } from "./dom.js";

const MAX_LENGTH = 40000; // longer code stays plain
const HASH = /^(python|py|bash|sh|shell|zsh|console|yaml|yml|toml|ruby|rb|r|perl|make|makefile|dockerfile|julia)$/i;
const DASH = /^(sql|lua|haskell|hs|ada)$/i;
const PLAIN = /^(|text|txt|plain|output|markdown|md|diff)$/i;
const WORDS =
  "abstract and as assert async await bool boolean break case catch char class const continue def default defer del delete do " +
  "done double elif else end enum esac except export extends false fi finally float fn for from func function global go goto if " +
  "impl implements import in instanceof int interface is lambda let local long loop match mod module mut namespace new nil None " +
  "nonlocal not null or package pass private protected pub public raise return select self short signed static string struct " +
  "super switch template then this throw trait True False true try type typedef typeof undefined union unless unsigned unsafe " +
  "until use using var virtual void volatile when where while with yield " +
  "SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE JOIN LEFT RIGHT INNER OUTER ON GROUP BY ORDER LIMIT AS AND OR NOT NULL";
const KNOWN = new Set(WORDS.split(" "));
const TEXTS = `"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:[^"\\\\\\n]|\\\\.)*"?|'(?:[^'\\\\\\n]|\\\\.)*'?|\`[^\`]*\`?`;
const NUMBERS = "\\b\\d[\\w.]*";
const NAMES = "[A-Za-z_][\\w]*";

/** The code as nodes: strings, and spans with the class of what they are. */
export function coloured(text, language) {
  if (PLAIN.test(language) || text.length > MAX_LENGTH) return [text];
  const note = HASH.test(language) ? "#[^\\n]*" : DASH.test(language) ? "--[^\\n]*" : "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
  const pattern = new RegExp(`(${note})|(${TEXTS})|(${NUMBERS})|(${NAMES})`, "g");
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(pattern)) {
    const kind = found[1] ? "note-text" : found[2] ? "text" : found[3] ? "number" : KNOWN.has(found[4]) ? "word" : null;
    if (!kind) continue;
    nodes.push(text.slice(end, found.index), element("span", { class: kind }, found[0]));
    end = found.index + found[0].length;
  }
  return [...nodes, text.slice(end)];
}
