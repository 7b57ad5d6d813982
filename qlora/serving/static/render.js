// Texts as elements. Nothing that comes from a document, a file name or a model is ever parsed as HTML.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const INLINE = /\*\*([^*\n]+)\*\*|`([^`\n]+)`|\[(\d{1,3})\]/g;

// **bold**, `code` and [n] of a line; `chip(n)` makes the element of a citation.
function inline(text, chip) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(at, match.index));
    if (match[1]) parts.push(element("strong", {}, match[1]));
    else if (match[2]) parts.push(element("code", {}, match[2]));
    else parts.push(chip(Number(match[3])) ?? match[0]);
    at = match.index + match[0].length;
  }
  return [...parts, text.slice(at)];
}

// An answer: paragraphs, and lists of lines that begin with "- " or "1. ". Unsupported sentences are marked.
export function showAnswer(box, text, unsupported, chip) {
  const blocks = [];
  for (const line of text.split("\n")) {
    const item = line.match(/^\s*(?:[-*]|\d+[.)])\s+(.*)/);
    const shown = markUnsupported(item ? item[1] : line, unsupported, chip);
    if (item && blocks.at(-1)?.tagName === "UL") blocks.at(-1).append(element("li", {}, ...shown));
    else if (item) blocks.push(element("ul", {}, element("li", {}, ...shown)));
    else if (line.trim()) blocks.push(element("p", {}, ...shown));
  }
  box.replaceChildren(...blocks);
}

function markUnsupported(line, unsupported, chip) {
  for (const sentence of unsupported) {
    const at = line.indexOf(sentence);
    if (at < 0) continue;
    const title = "The cited passages do not support this sentence";
    const marked = element("span", { class: "unsupported", title }, ...inline(sentence, chip));
    const rest = unsupported.filter((other) => other !== sentence);
    return [
      ...markUnsupported(line.slice(0, at), rest, chip),
      marked,
      ...markUnsupported(line.slice(at + sentence.length), rest, chip),
    ];
  }
  return inline(line, chip);
}

const UNITS = ["page", "slide", "chapter", "paragraph", "line", "row", "part"];

// `crew.md, line 9, Crew > Watches`
export function place(found) {
  const unit = UNITS.find((name) => found[name] != null);
  const pages = found.last_page ? `pages ${found.page}–${found.last_page}` : null;
  return [found.source, pages ?? (unit && `${unit} ${found[unit]}`), found.heading].filter(Boolean).join(", ");
}

export function showPassage(passage) {
  const [from, to] = passage.span ?? [0, 0];
  const text = passage.text;
  const parts = [text.slice(0, from), to ? element("mark", {}, text.slice(from, to)) : null, text.slice(to)];
  return element("div", { class: "passage" }, ...parts);
}

export function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// The conversation as Markdown.
export function asMarkdown(turns) {
  return turns
    .map((turn) => {
      const sources = (turn.citations ?? []).map((found) => `* [${found.n}] ${place(found)}: ${found.sentence}`);
      return `**${turn.question}**\n\n${turn.answer}\n\n${sources.join("\n")}`.trim();
    })
    .join("\n\n---\n\n");
}
