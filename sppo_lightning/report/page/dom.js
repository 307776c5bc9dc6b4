// Elements, and hostile texts on their way to people: a text is set as a text node, never read as HTML.

const CONTROLS =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|\p{Surrogate}/gu;
const CLIPPED = 4000; // characters of a text that are shown at first
const MOST = 2_000_000; // characters that are shown at all

function el(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const codePoint = (character) => "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

// A text in one line, for a cell: what a browser would obey is spelled out.
function inLine(text) {
  return String(text).replace(/\s+/gu, " ").replace(CONTROLS, (found) => `‹${codePoint(found)}›`);
}

// Nodes of a text: characters that hide, reorder or end something are shown by their number.
function textNodes(text) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(CONTROLS)) {
    if (found[0] === "\r" && text[found.index + 1] === "\n") continue;
    nodes.push(text.slice(last, found.index));
    nodes.push(el("span", { class: "control", title: "a control character" }, codePoint(found[0])));
    last = found.index + found[0].length;
  }
  nodes.push(text.slice(last));
  return nodes;
}

// A block of text with its line breaks; a long one is clipped until somebody asks for the rest.
function textBlock(text, { className = "text", render = textNodes } = {}) {
  const block = el("div", { class: className, dir: "auto" });
  if (text === "") {
    block.append(el("span", { class: "nothing" }, "(empty)"));
    return block;
  }
  if (text.length <= CLIPPED * 1.2) {
    block.append(...render(text));
    return block;
  }
  block.append(...render(text.slice(0, CLIPPED)), "…");
  const size = text.length.toLocaleString("en");
  const what = text.length > MOST ? `Show the first ${MOST.toLocaleString("en")} of ${size} characters` : `Show all ${size} characters`;
  const more = el("button", { type: "button", class: "more" }, what);
  more.addEventListener("click", () => {
    block.replaceChildren(...render(text.slice(0, MOST)));
    more.remove();
  });
  return el("div", {}, block, more);
}

function tableOf(heads, rows, { caption, className = "" } = {}) {
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      { class: `plain ${className}` },
      caption ? el("caption", {}, caption) : null,
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
      el(
        "tbody",
        {},
        ...rows.map((cells) =>
          el("tr", {}, ...cells.map((cell, place) => el(place ? "td" : "th", place ? {} : { scope: "row" }, cell))),
        ),
      ),
    ),
  );
}
